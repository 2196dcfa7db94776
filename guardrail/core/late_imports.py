"""The two lists that core looks up by name: the detectors and the remedies.

Both stand in rooms above core, which core does not import. A configuration needs the settings of
each detector, and a finding read from a journal needs the wording of its detector. So core imports
the module that holds the list when it is first needed.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

DETECTORS = "guardrail.detectors.build"


@functools.cache
def _load(module: str) -> Any:
    return importlib.import_module(module)


def find_detector(kind: Any) -> Any:
    """Return the detector class that reports findings of this kind.

    A kind that no detector reports, as of another version, has the base class `Detector`.
    """
    return _load(DETECTORS).find_detector(kind)
