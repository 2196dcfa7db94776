"""One rollback that was done, as the journal holds it. Pure."""

from __future__ import annotations

from guardrail.core.events.decisions import RolledBack
from guardrail.core.records.record import Record


class Rollback(Record, frozen=True, kw_only=True):
    """One rollback that was done.

    Attributes:
        from_step: applied steps when it was decided.
        to_step: applied steps of the state that was restored.
        onset: first step of the anomaly.
        window: positions [first, last) that it skipped.
        escalation: action of the escalation step that it was, "" for a user's.
        incident: that it answered; None: none.
        new_timeline: that it began.
        by_person: a user commanded it. It does not count towards the budget of rollbacks.
    """

    from_step: int
    to_step: int
    onset: int
    window: tuple[int, int]
    by_person: bool = False
    escalation: str = ""
    incident: int | None = None
    new_timeline: int = 0


def rollback_of(event: RolledBack) -> Rollback:
    """Return the rollback of a journal line. Raises ValueError where the line is damaged."""
    event.check_readable("incident")
    if event.from_step is None or event.to_step is None:
        raise ValueError(f"line {event.seq}: a rollback between no states")
    if event.onset is None or event.window is None:
        raise ValueError(f"line {event.seq}: a rollback without onset or window")
    new_timeline = event.timeline + 1
    if event.new_timeline is not None:
        new_timeline = event.new_timeline
    return Rollback(
        from_step=event.from_step,
        to_step=event.to_step,
        onset=event.onset,
        window=event.window,
        by_person=event.is_by_user,
        escalation=event.escalation,
        incident=None if event.is_by_user else event.incident,
        new_timeline=new_timeline,
    )
