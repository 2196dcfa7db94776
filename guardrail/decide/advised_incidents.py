"""Verdicts of the mode `advise`, which are not carried out: one line for each incident, not one for
each step. Pure.
"""

from __future__ import annotations

from guardrail.core.events.event import Event
from guardrail.core.records import Action

# what happens to a step about which the guard only advises
_DONE = (Action.APPLY.value, Action.FP16_OVERFLOW.value)


def would_of(event: Event) -> str:
    """The action that a verdict only advises, as the journal calls it; "" for any other event."""
    would = event.data.get("would")
    if (
        event.kind != "verdict"
        or event.data.get("action") not in _DONE
        or not isinstance(would, str)
    ):
        return ""
    return "" if would == Action.APPLY.value else would


def advised_words(would: str) -> str:
    """ "would skip", "would roll back": what the guard would do with a step, in the mode
    `advise`.
    """
    return f"would {'roll back' if would == Action.ROLLBACK.value else would}"


class AdvisedIncidents:
    """Takes in events in their order."""

    def __init__(self) -> None:
        self._known: set[tuple[int, str]] = set()

    def is_repeated(self, event: Event) -> bool:
        """Whether the event only advises once more what has been advised for its incident
        before.
        """
        would, number = would_of(event), event.data.get("incident")
        if not would or not isinstance(number, int) or number <= 0:
            return False
        key = (number, would)
        repeated = key in self._known
        self._known.add(key)
        return repeated
