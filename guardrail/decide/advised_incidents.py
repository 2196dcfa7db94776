"""Verdicts of the mode `advise`, which are not carried out: one line per incident, not per step.

Pure.
"""

from __future__ import annotations

from guardrail.core.events.event import Event
from guardrail.core.records.verdicts import Action

# Actions that are taken on a step in `advise`.
_DONE = (Action.APPLY.value, Action.FP16_OVERFLOW.value)


def find_advised_action(event: Event) -> str:
    """Return the action that a verdict only advises, as the journal names it; "" for others."""
    would = event.data.get("would")
    if event.kind != "verdict" or event.data.get("action") not in _DONE:
        return ""
    if not isinstance(would, str) or would == Action.APPLY.value:
        return ""
    return would


def advised_words(would: str) -> str:
    """Return what the guard would do with a step in the mode `advise`: "would roll back"."""
    if would == Action.ROLLBACK.value:
        return "would roll back"
    return f"would {would}"


class AdvisedIncidents:
    """Finds repeated advice; takes events in their order."""

    def __init__(self) -> None:
        self._known: set[tuple[int, str]] = set()

    def is_repeated(self, event: Event) -> bool:
        """Return whether the event only repeats an advice of its incident."""
        would, number = find_advised_action(event), event.data.get("incident")
        if not would or not isinstance(number, int) or number <= 0:
            return False
        key = (number, would)
        repeated = key in self._known
        self._known.add(key)
        return repeated
