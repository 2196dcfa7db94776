"""The two lists that core looks up by name: the detectors and the remedies.

Both are in rooms above core, which core does not import. A configuration needs the settings of
each detector. A finding from a journal needs the wording of its detector. So core imports the
module with the list when it is first needed.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

from guardrail.core.section import Section

DETECTORS = "guardrail.detectors.build"
REMEDIES = "guardrail.decide.remedies.registry"
GUARD_OPTIONS = "guardrail.core.guard_options"  # where the type of [guard.detectors] stands


@functools.cache
def _load(module: str) -> Any:
    return importlib.import_module(module)


def make_detector_sections() -> type[Section]:
    """Return the type of [guard.detectors]: one table for each type of settings."""
    settings = _load(DETECTORS).SETTINGS
    namespace: dict[str, Any] = {"__annotations__": dict(settings), "__module__": GUARD_OPTIONS}
    namespace["__doc__"] = "[guard.detectors]: the settings of the detectors."
    namespace |= {table: cls() for table, cls in settings.items()}
    return types.new_class(
        "DetectorSections",
        (Section,),
        {"frozen": True, "kw_only": True},
        lambda body: body.update(namespace),
    )


def find_detector(kind: Any) -> Any:
    """Return the detector class that reports findings of this kind.

    A kind that no detector reports, as of another version, has the base class `Detector`.
    """
    return _load(DETECTORS).find_detector(kind)


def find_remedy(action: str) -> Any:
    """Return the class of a remedy of [[guard.escalation]]. Raises KeyError for another name."""
    return _load(REMEDIES).BY_ACTION[action]


def list_remedies() -> tuple[str, ...]:
    """Return the names of all remedies of [[guard.escalation]]."""
    return tuple(_load(REMEDIES).BY_ACTION)


def list_effects() -> tuple[str, ...]:
    """Return the kinds of effects that `guard.remedies` can hold."""
    return tuple(_load(REMEDIES).BY_EFFECT)
