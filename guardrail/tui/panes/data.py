"""The pane of the data: where the run is in it, and which samples it skips and why."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import (
    clean_and_shorten,
    format_count,
    format_plural,
    format_short_count,
)
from guardrail.tui.draw.lines import Row, fit_row, make_row
from guardrail.tui.model.evidence import SkippedSpan
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import (
    empty_row,
    entries_in_view,
    mark_entry,
    named_facts,
    pane_title,
    wrapped_fact_rows,
)
from guardrail.tui.panes.pane import Pane

# origin of a span -> its words
_ORIGINS = {
    "rejected": "update skipped",
    "rollback": "by rollback",
    "user": "by command",
    "file": "by a list",
}
_NAMED = 3  # documents that an entry names


def _matching_spans(view: View, state: PaneState) -> list[SkippedSpan]:
    """Return the spans that are skipped, newest first."""
    spans = view.snapshot.story.known.skipped
    if not state.filter:
        return list(spans)
    return [one for one in spans if state.shows(_text(one))]


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    rows = [pane_title("data", width, state)]
    rows += [fit_row(line, width) for line in _position_rows(view)]
    spans = _matching_spans(view, state)
    if not spans:
        return [*rows, empty_row(state, "no sample is skipped", width)][:height]
    for index in entries_in_view(len(spans), height - len(rows), state):
        rows.append(fit_row(mark_entry(make_row(_text(spans[index])), index, state), width))
    return rows[:height]


def _describe(view: View, one: SkippedSpan, width: int) -> Sequence[Row]:
    """Return the positions of a span, why it is skipped, and the documents in the journal."""
    span, reason = one.span, clean_and_shorten(one.span.reason, 400)
    decided = f"at step {format_count(span.step)}: {_origin(one)}"
    if reason:
        decided += f", {reason}"
    last = max(span.first, span.last - 1)
    samples = f"{format_count(one.samples)} in {format_plural(span.batches, 'batch')}"
    if span.positions:
        samples = f"{format_count(one.samples)} of these positions"
    facts = [
        ("decided", decided),
        ("positions", f"{format_count(span.first)} to {format_count(last)}"),
        ("samples", samples),
    ]
    if one.incident:
        facts.append(("incident", f"#{one.incident}"))
    facts += named_facts("documents", one.documents)
    return wrapped_fact_rows(facts, width)


def _position_rows(view: View) -> list[Row]:
    status, known = view.status, view.snapshot.story.known
    rows: list[Row] = []
    if status is not None:
        epoch = ""
        if known.samples:
            epochs, rest = divmod(status.cursor, known.samples)
            epoch = f"   epoch {epochs + 1}, {100 * rest // known.samples} %"
        tokens = format_short_count(status.tokens)
        rows.append(
            make_row(f" position {format_count(status.cursor)}{epoch}   {tokens} tokens trained on")
        )
    if known.samples_skipped:
        rows.append(
            make_row((f" {format_plural(known.samples_skipped, 'sample')} skipped", "strong"))
        )
    return rows


def _origin(one: SkippedSpan) -> str:
    return _ORIGINS.get(one.span.origin, clean_and_shorten(one.span.origin, 20))


def _text(one: SkippedSpan) -> str:
    text = f"step {format_count(one.span.step):>7}  {format_plural(one.samples, 'sample'):>11}"
    text += f"  {_origin(one)}"
    if one.incident:
        text += f"  #{one.incident}"
    if one.span.reason:
        text += f"  {clean_and_shorten(one.span.reason, 80)}"
    names = ", ".join(name.rsplit("/", 1)[-1] for name in one.documents[:_NAMED])
    more = len(one.documents) - _NAMED
    if more > 0:
        names += f" +{more}"
    return f"{text}  {names}"


PANE = Pane(
    "data",
    "position, tokens, skipped samples",
    _matching_spans,
    _build,
    describe=_describe,
    step_of=lambda one: one.span.step,
)
