"""Which decision of a journal an `undo` means, and what else it undoes. Pure.

Undoing a decision removes its samples from the quarantine. The window of a rollback contains the
batches that were rejected before it, so these are undone with it. Samples that a user or a file
has quarantined stay quarantined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from guardrail.core.events.decisions import HIGHER_LOSS, RECOVERED
from guardrail.core.events.event import Event
from guardrail.core.files import as_int
from guardrail.core.records import AUTOMATIC, Record, Span


class UndoPlan(Record, frozen=True, kw_only=True):
    """What an undo would do.

    Attributes:
        of: seq of the decision's journal line.
        kind: of that line: "skipped", "rollback" or "remedy".
        message: of that line.
        spans: that leave the quarantine.
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
        """How many positions leave the quarantine."""
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
    """Return what an undo would do; or why there is nothing to undo, as the end of a sentence.

    Args:
        events: of the complete journal, in order.
        seq: of the decision's line; None: the newest decision of the guard that is not undone.
    """
    events = list(events)
    decisions: list[Event] = []
    undone: set[int] = set()
    for event in events:
        if event.kind in ("skipped", "rollback", "remedy"):
            decisions.append(event)
        elif event.kind == "undo":
            undone.update(as_int(of) for of in as_list(event.data.get("lines")))
    standing = [event for event in decisions if event.seq not in undone]
    if seq is None:
        automatic = [event for event in standing if _is_automatic(event)]
        if not automatic:
            return "there is no decision of the guard that is not undone"
        return _plan_undo(automatic[-1], standing, events)
    for event in standing:
        if event.seq == seq:
            return _plan_undo(event, standing, events)
    if seq in undone:
        return f"line {seq} is undone already"
    return f"line {seq} of the journal is not a decision"


def as_list(value: Any) -> Sequence[Any]:
    """Return a list or tuple as it is, and () for anything else."""
    return value if isinstance(value, list | tuple) else ()


def _is_automatic(event: Event) -> bool:
    span = span_in(event)
    if event.kind == "remedy":
        return event.data.get("who") in (None, "", "guard")
    return span is not None and span.origin in AUTOMATIC


def _plan_undo(event: Event, standing: Sequence[Event], events: Sequence[Event]) -> UndoPlan | str:
    span = span_in(event)
    if span is None:
        return UndoPlan(
            of=event.seq,
            kind=event.kind,
            message=event.message,
            before_step=event.step + 1,
            incident=event.data.get("incident"),
        )
    for other in standing:
        theirs = span_in(other)
        if other.seq > event.seq and theirs is not None and _covers(theirs, span):
            return f"line {other.seq} has skipped the same samples since: undo that one"
    spans, rollbacks = [span], _new_timeline(event)
    pardons: list[tuple[int, int]] = []
    if span.origin in AUTOMATIC:
        for other in standing:
            theirs = span_in(other)
            if other is event or theirs is None:
                continue
            if theirs.origin in AUTOMATIC and _covers(span, theirs):
                spans.append(theirs)
                rollbacks += _new_timeline(other)
        for one in spans:
            pardons += group_positions(positions_of(one))
        batch = _judged_batch(event, events)
        if batch and all(_is_empty(one) for one in spans) and _is_over(event, events):
            return (
                f"line {event.seq} skipped no data, its batch was applied afterwards, and incident "
                f"{event.data.get('incident')} is over: going back would only repeat steps"
            )
        pardons += batch
    return UndoPlan(
        of=event.seq,
        kind=event.kind,
        message=event.message,
        spans=tuple(spans),
        pardons=tuple(merge_ranges(pardons)),
        rollbacks=tuple(rollbacks),
        first=min(one.first for one in spans),
        before_step=event.step + 1,
        incident=event.data.get("incident"),
    )


def _is_empty(span: Span) -> bool:
    """Return whether a span skips no position."""
    ranges = split_span(span)
    return ranges[0][0] >= ranges[-1][1]


def _is_over(event: Event, events: Sequence[Event]) -> bool:
    """Return whether a decision has no remedies, and its incident has ended since."""
    if as_list(event.data.get("remedies")):
        return False
    number = event.data.get("incident")
    if number is None:
        return False
    state = None
    for later in events:
        if (
            later.seq > event.seq
            and later.kind == "incident"
            and later.data.get("number") == number
        ):
            state = later.data.get("state")
    return state in (RECOVERED, HIGHER_LOSS)


def _judged_batch(event: Event, events: Sequence[Event]) -> list[tuple[int, int]]:
    """Return the range of the batch whose verdict an event carries out; [] if it is not known.

    A rollback may skip other positions than that, or none.
    """
    number = event.data.get("incident")
    for before in reversed(events):
        if before.seq >= event.seq or before.kind != "verdict":
            continue
        if before.data.get("incident") == number:
            batch = as_list(before.data.get("batch"))
            if len(batch) != 2:
                return []
            return [(as_int(batch[0]), as_int(batch[1]))]
    return []


def lines_to_undo(events: Iterable[Event], undoing: UndoPlan) -> list[int]:
    """Return the numbers of all journal lines that the undo undoes, ascending."""
    spans = set(undoing.spans)
    lines = {undoing.of}
    for event in events:
        if event.kind in ("skipped", "rollback") and span_in(event) in spans:
            lines.add(event.seq)
    return sorted(lines)


def _new_timeline(event: Event) -> list[int]:
    """Return the timeline that a rollback began; [] for other events."""
    if event.kind != "rollback":
        return []
    return [as_int(event.data.get("new_timeline"), -1)]


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


def undone_spans(event: Event) -> list[Span]:
    """Return the spans of an `undo` event, without those that cannot be read."""
    spans = [as_span(one) for one in as_list(event.data.get("spans"))]
    return [span for span in spans if span is not None]


def span_in(event: Event) -> Span | None:
    """Return the span of an event, which is a record or a dict from the journal; None if none."""
    return as_span(event.data.get("span"))


def as_span(raw: Any) -> Span | None:
    """Return a span from the journal; None if there is none that can be read."""
    if raw is None or isinstance(raw, Span):
        return raw
    try:
        return msgspec.convert(raw, Span, strict=False)
    except msgspec.ValidationError:
        return None
