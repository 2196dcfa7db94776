"""Which decision of a journal an `undo` means, and all that goes with it. Pure.

Undoing a decision takes its samples back out of the quarantine. A rollback's window holds the
batches that were rejected before it, so these go with it; what a person or a file has left out
stays out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.files import as_int
from guardrail.core.records import AUTOMATIC, Record, Span


class UndoPlan(Record, frozen=True, kw_only=True):
    """What an undo would do.

    Attributes:
        of: seq of the decision's journal line.
        kind: of that line: "skipped", "rollback" or "remedy".
        message: of that line.
        spans: what comes back out of the quarantine.
        pardons: stretches [first, last) of positions whose batches the guard must not reject again.
        rollbacks: timelines that undone rollbacks began; these leave the budget.
        first: first position concerned; the state to go back to has not passed it. None: the step
        alone counts.
        before_step: applied steps of that state are fewer than this.
        incident: that the decision was about, None without one.
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
        """How many positions come back."""
        return len({position for span in self.spans for position in positions_of(span)})


def positions_of(span: Span) -> Sequence[int]:
    """The positions that a span leaves out."""
    return span.positions or range(span.first, span.last)


def split_span(span: Span) -> list[tuple[int, int]]:
    """The same as stretches [first, last), without listing the positions of a long span."""
    return (
        stretches(span.positions) if span.positions else [(span.first, max(span.first, span.last))]
    )


def find(events: Iterable[Event], seq: int | None = None) -> UndoPlan | str:
    """The decision that is meant.

    Args:
        events: of the whole journal, in order.
        seq: of its line; None: the newest one of the guard's own that stands.

    Returns:
        Why there is nothing to undo, as the end of a sentence, where that is so.
    """
    events = list(events)
    decisions = [
        event for event in events if event.kind in ("skipped", "rollback", "remedy", "undo")
    ]
    gone = {
        as_int(of)
        for event in decisions
        if event.kind == "undo"
        for of in as_list(event.data.get("lines"))
    }
    standing = [event for event in decisions if event.kind != "undo" and event.seq not in gone]
    if seq is None:
        automatic = [event for event in standing if _automatic(event)]
        if not automatic:
            return "there is no decision of the guard that stands"
        return _undoing(automatic[-1], standing, events)
    meant = next((event for event in standing if event.seq == seq), None)
    if meant is not None:
        return _undoing(meant, standing, events)
    return (
        f"line {seq} is undone already"
        if seq in gone
        else f"line {seq} of the journal is no decision"
    )


def as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _automatic(event: Event) -> bool:
    span = span_in(event)
    if event.kind == "remedy":
        return event.data.get("who") in (None, "", "guard")
    return span is not None and span.origin in AUTOMATIC


def _undoing(event: Event, standing: Sequence[Event], events: Sequence[Event]) -> UndoPlan | str:
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
            return f"line {other.seq} has left the same samples out since: undo that one"
    spans, rollbacks = [span], [*_timeline(event)]
    for other in standing if span.origin in AUTOMATIC else ():
        theirs = span_in(other)
        if (
            other is not event
            and theirs is not None
            and theirs.origin in AUTOMATIC
            and _covers(span, theirs)
        ):
            spans.append(theirs)
            rollbacks += _timeline(other)
    pardons = [
        stretch
        for one in spans
        if one.origin in AUTOMATIC
        for stretch in stretches(positions_of(one))
    ]
    batch = _batch_behind(event, events) if span.origin in AUTOMATIC else []
    if (
        batch
        and not any(split_span(one)[0][0] < split_span(one)[-1][1] for one in spans)
        and _is_over(event, events)
    ):
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
        pardons=tuple(joined(pardons)),
        rollbacks=tuple(rollbacks),
        first=min(one.first for one in spans),
        before_step=event.step + 1,
        incident=event.data.get("incident"),
    )


def _is_over(event: Event, events: Sequence[Event]) -> bool:
    """Whether the incident of a decision has ended since, and nothing of the decision is still in
    force.
    """
    if as_list(event.data.get("remedies")):
        return False
    number = event.data.get("incident")
    states = [e.data.get("state") for e in events if e.seq > event.seq and e.kind == "incident"
              and e.data.get("number") == number]  # fmt: skip
    return (
        number is not None
        and bool(states)
        and states[-1] in ("recovered", "recovered with higher loss")
    )


def _batch_behind(event: Event, events: Sequence[Event]) -> list[tuple[int, int]]:
    """The batch whose verdict an event carries out: a rollback may leave out others than that, or
    nothing at all.
    """
    number = event.data.get("incident")
    for before in reversed(events):
        if (
            before.seq < event.seq
            and before.kind == "verdict"
            and before.data.get("incident") == number
        ):
            batch = before.data.get("batch")
            return (
                [(as_int(batch[0]), as_int(batch[1]))]
                if isinstance(batch, list | tuple) and len(batch) == 2
                else []
            )
    return []


def lines_of(events: Iterable[Event], undoing: UndoPlan) -> list[int]:
    """Seqs of all journal lines that the undo takes back."""
    spans = set(undoing.spans)
    return sorted(
        {undoing.of}
        | {
            e.seq
            for e in events
            if e.kind in ("skipped", "rollback") and (s := span_in(e)) is not None and s in spans
        }
    )


def _timeline(event: Event) -> list[int]:
    return [as_int(event.data.get("new_timeline"), -1)] if event.kind == "rollback" else []


def _covers(outer: Span, inner: Span) -> bool:
    if not (outer.first <= inner.first and inner.last <= outer.last):
        return False
    return not outer.positions or set(positions_of(inner)) <= set(outer.positions)


def stretches(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending positions as stretches [first, last)."""
    if isinstance(positions, range):
        return [(positions.start, positions.stop)]
    return joined((position, position + 1) for position in positions)


def joined(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of stretches, ascending, without overlap and without empty ones."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(piece for piece in pieces if piece[0] < piece[1]):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def undone_spans(event: Event) -> list[Span]:
    """The spans of an `undo` event; one that makes no sense is passed over."""
    raw = event.data.get("spans")
    spans = [as_span(one) for one in (raw if isinstance(raw, list | tuple) else ())]
    return [span for span in spans if span is not None]


def span_in(event: Event) -> Span | None:
    """The span of an event, as a record or as what it became in the journal."""
    return as_span(event.data.get("span"))


def as_span(raw: Any) -> Span | None:
    if raw is None or isinstance(raw, Span):
        return raw
    try:
        return msgspec.convert(raw, Span, strict=False)
    except msgspec.ValidationError:
        return None
