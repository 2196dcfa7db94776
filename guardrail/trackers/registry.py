"""The list of trackers. A new one is a file in this folder and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardrail.core.packages import is_installed
from guardrail.trackers.base import Tracker
from guardrail.trackers.tensorboard import TensorBoard

TRACKERS: tuple[type[Tracker], ...] = (TensorBoard,)


def enabled_trackers(config: Mapping[str, Any]) -> list[type[Tracker]]:
    """Return the trackers that this configuration enables and whose package is installed.

    The launcher warns about a package that is missing.
    """
    enabled = [tracker for tracker in TRACKERS if tracker.is_enabled(config)]
    return [each for each in enabled if not each.package or is_installed(each.package)]
