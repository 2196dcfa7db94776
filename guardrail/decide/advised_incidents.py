"""Verdicts of the mode `advise`, which are not carried out: one line per incident, not per step.

Pure.
"""

from __future__ import annotations

from guardrail.core.events.decisions import VerdictGiven
from guardrail.core.events.event import Event
from guardrail.core.records.verdicts import Action


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
        if not isinstance(event, VerdictGiven) or not event.advised:
            return False
        if event.incident is None or event.incident <= 0:
            return False
        key = (event.incident, event.advised)
        repeated = key in self._known
        self._known.add(key)
        return repeated
