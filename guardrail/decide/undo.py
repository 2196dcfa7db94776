"""Which decision of a journal an `undo` means, and what else it undoes. Pure.

Undoing a decision removes its samples from the quarantine. The window of a rollback contains the
batches that were rejected before it, so these are undone with it. Samples that a user or a file
has quarantined stay quarantined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from guardrail.core.events.decisions import (
    HIGHER_LOSS,
    RECOVERED,
    IncidentChanged,
    RemedyUsed,
    RolledBack,
    Skipped,
    Undone,
    VerdictGiven,
)
from guardrail.core.events.event import Event
from guardrail.core.records.record import Record
from guardrail.core.records.spans import AUTOMATIC, Span

Decision = Skipped | RolledBack | RemedyUsed


class UndoPlan(Record, frozen=True, kw_only=True):
    """What an undo would do.

    Attributes:
        of: seq of the decision's journal line.
        kind: of that line: "skipped", "rollback" or "remedy".
        message: of that line.
        spans: that are no longer quarantined.
        pardons: ranges [first, last) of positions whose batches the guard must not reject again.
        rollbacks: timelines that the undone rollbacks began; these no longer count.
        first: first position concerned; the state to restore has not used it. None: only the step
            counts.
        before_step: that state has fewer applied steps than this.
        incident: of the decision; None: none.
    """

    of: int
    kind: str
    message: str = ""
    spans: tuple[Span, ...] = ()
    pardons: tuple[tuple[int, int], ...] = ()
    rollbacks: tuple[int, ...] = ()
    first: int | None = None
    before_step: int = 0
    incident: int | None = None

    @property
    def positions(self) -> int:
        """Return how many positions are no longer quarantined."""
        positions: set[int] = set()
        for span in self.spans:
            positions.update(positions_of(span))
        return len(positions)


def positions_of(span: Span) -> Sequence[int]:
    """Return the positions that a span skips."""
    return span.positions or range(span.first, span.last)


def split_span(span: Span) -> list[tuple[int, int]]:
    """Return the positions of a span as ranges [first, last); lists none of a long span."""
    if span.positions:
        return group_positions(span.positions)
    return [(span.first, max(span.first, span.last))]


def find_undo_plan(events: Iterable[Event], seq: int | None = None) -> UndoPlan | str:
    """Return what the undo of a decision does.

    Args:
        events: all events of the journal, in order.
        seq: of the decision's line; None: the newest automatic decision that is not undone.

    Returns:
        The plan; or why there is nothing to undo, as the end of a sentence.
    """
    events = list(events)
    undone = {seq for event in events if isinstance(event, Undone) for seq in event.lines}
    decisions = [event for event in events if isinstance(event, Skipped | RolledBack | RemedyUsed)]
    standing = [event for event in decisions if event.seq not in undone]
    if seq is None:
        automatic = [event for event in standing if _is_automatic(event)]
        if not automatic:
            return "there is no decision of the guard that is not undone"
        return _make_plan(automatic[-1], standing, events)
    for event in standing:
        if event.seq == seq:
            return _make_plan(event, standing, events)
    if seq in undone:
        return f"line {seq} is undone already"
    return f"line {seq} of the journal is not a decision"


def _is_automatic(event: Decision) -> bool:
    """Return whether the guard made a decision by itself."""
    if isinstance(event, RemedyUsed):
        return event.who in (None, "", "guard")
    return event.span is not None and event.span.origin in AUTOMATIC


def _make_plan(
    event: Decision, standing: Sequence[Decision], events: Sequence[Event]
) -> UndoPlan | str:
    """Return the plan for one decision; `standing` are those that were not undone."""
    if isinstance(event, RemedyUsed) or event.span is None:
        return UndoPlan(
            of=event.seq,
            kind=event.kind,
            message=event.message,
            before_step=event.step + 1,
            incident=event.incident,
        )
    others = [one for one in standing if isinstance(one, Skipped | RolledBack)]
    for other in others:
        if other.seq > event.seq and other.span is not None and _covers(other.span, event.span):
            return f"line {other.seq} has skipped the same samples since: undo that one"
    automatic = event.span.origin in AUTOMATIC
    taken = [event, *(_list_covered(event, others) if automatic else [])]
    spans = [one.span for one in taken if one.span is not None]
    pardons: list[tuple[int, int]] = []
    batch: list[tuple[int, int]] = []
    if automatic:
        pardons = [piece for span in spans for piece in group_positions(positions_of(span))]
        batch = _find_batch(event, events)
    if batch and not any(_has_samples(span) for span in spans) and _is_over(event, events):
        return (
            f"line {event.seq} skipped no data, its batch was applied afterwards, and incident "
            f"{event.incident} is over: going back would only repeat steps"
        )
    return UndoPlan(
        of=event.seq,
        kind=event.kind,
        message=event.message,
        spans=tuple(spans),
        pardons=tuple(merge_ranges([*pardons, *batch])),
        rollbacks=tuple(_timeline_of(one) for one in taken if isinstance(one, RolledBack)),
        first=min(span.first for span in spans),
        before_step=event.step + 1,
        incident=event.incident,
    )


def _list_covered(
    event: Skipped | RolledBack, others: Sequence[Skipped | RolledBack]
) -> list[Skipped | RolledBack]:
    """Return the other automatic decisions whose samples are all part of those of this one."""
    found = []
    for other in others:
        if other is event or other.span is None or event.span is None:
            continue
        if other.span.origin in AUTOMATIC and _covers(event.span, other.span):
            found.append(other)
    return found


def _has_samples(span: Span) -> bool:
    pieces = split_span(span)
    return pieces[0][0] < pieces[-1][1]


def _is_over(event: Skipped | RolledBack, events: Sequence[Event]) -> bool:
    """Return whether the incident of a decision has ended since, and no remedy of it holds."""
    if event.remedies or "remedies" in event.unreadable or event.incident is None:
        return False
    state = ""
    for later in events:
        if isinstance(later, IncidentChanged) and later.number == event.incident:
            if later.seq > event.seq:
                state = later.state
    return state in (RECOVERED, HIGHER_LOSS)


def _find_batch(event: Skipped | RolledBack, events: Sequence[Event]) -> list[tuple[int, int]]:
    """Return the batch whose verdict a decision carries out, as the only item.

    A rollback may skip other batches than that, or none at all.
    """
    for before in reversed(events):
        if before.seq >= event.seq or not isinstance(before, VerdictGiven):
            continue
        if before.incident == event.incident:
            return [] if before.batch is None else [before.batch]
    return []


def lines_to_undo(events: Iterable[Event], undoing: UndoPlan) -> list[int]:
    """Return the numbers of all journal lines that the undo takes back."""
    lines = {undoing.of}
    for event in events:
        if isinstance(event, Skipped | RolledBack) and event.span in undoing.spans:
            lines.add(event.seq)
    return sorted(lines)


def _timeline_of(event: RolledBack) -> int:
    return -1 if event.new_timeline is None else event.new_timeline


def _covers(outer: Span, inner: Span) -> bool:
    if not (outer.first <= inner.first and inner.last <= outer.last):
        return False
    return not outer.positions or set(positions_of(inner)) <= set(outer.positions)


def group_positions(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending positions as ranges [first, last)."""
    if isinstance(positions, range):
        return [(positions.start, positions.stop)]
    return merge_ranges((position, position + 1) for position in positions)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of ranges, ascending, without overlap and without empty ones."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if first >= last:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
