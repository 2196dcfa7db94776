"""Pane 5: where the run is in its data, and what it leaves out and why."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import clean_and_shorten, format_plural, format_short_count
from guardrail.core.format import format_count as number
from guardrail.tui.draw.lines import Row, fit_row, make_row, wrap_text
from guardrail.tui.model.evidence import SkippedSpan
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import entries_in_view, mark_entry, pane_title

_CAUSES = {
    "rejected": "update left out",
    "rollback": "rolled back over",
    "user": "by command",
    "file": "by a list",
}


def found(view: View, state: PaneState) -> list[SkippedSpan]:
    """Stretches that are left out, newest first."""
    return [
        one
        for one in view.snapshot.story.known.left_out
        if not state.filter or state.shows(_text(one))
    ]


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def step(view: View, state: PaneState) -> int | None:
    known = found(view, state)
    return (
        known[state.cursor].span.step
        if state.cursor is not None and state.cursor < len(known)
        else None
    )


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    rows = [pane_title("data", width, state)]
    rows += [fit_row(line, width) for line in _where(view)]
    entries = found(view, state)
    if not entries:
        return [
            *rows,
            make_row((" nothing left out" if not state.filter else " none like that", "dim")),
        ][:height]
    for index in entries_in_view(len(entries), height - len(rows), state):
        rows.append(fit_row(mark_entry(make_row(_text(entries[index])), index, state), width))
    return rows[:height]


def detail(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """One stretch: its positions, why, and the documents that the journal names."""
    entries = found(view, state)
    if state.cursor is None or state.cursor >= len(entries):
        return []
    one = entries[state.cursor]
    span, reason = one.span, clean_and_shorten(one.span.reason, 400)
    facts = [
        (
            "decided",
            f"at step {number(span.step)}: {_cause(one)}" + (f", {reason}" if reason else ""),
        ),
        ("positions", f"{number(span.first)} to {number(max(span.first, span.last - 1))}"),
        (
            "samples",
            number(one.samples)
            + (" chosen ones" if span.positions else f" in {format_plural(span.batches, 'batch')}"),
        ),
    ]
    if one.incident:
        facts.append(("incident", f"#{one.incident}"))
    facts += [("documents" if not index else "", name) for index, name in enumerate(one.documents)]
    lines = [
        (name if not at else "", text)
        for name, told in facts
        for at, text in enumerate(wrap_text(told, width - 14))
    ]
    return [make_row((f"   {name:<10}", "dim"), text) for name, text in lines]


def _where(view: View) -> list[Row]:
    status, known = view.status, view.snapshot.story.known
    rows: list[Row] = []
    if status is not None:
        epoch = ""
        if known.samples:
            epochs, rest = divmod(status.cursor, known.samples)
            epoch = f"   epoch {epochs + 1}, {100 * rest // known.samples} %"
        rows.append(
            make_row(
                f" position {number(status.cursor)}{epoch}   {format_short_count(status.tokens)} tokens learnt from"
            )
        )
    if known.samples_out:
        rows.append(make_row((f" {format_plural(known.samples_out, 'sample')} left out", "strong")))
    return rows


def _cause(one: SkippedSpan) -> str:
    return _CAUSES.get(one.span.origin, clean_and_shorten(one.span.origin, 20))


def _text(one: SkippedSpan) -> str:
    incident = f"  #{one.incident}" if one.incident else ""
    names = ", ".join(name.rsplit("/", 1)[-1] for name in one.documents[:3])
    more = f" +{len(one.documents) - 3}" if len(one.documents) > 3 else ""
    reason = f"  {clean_and_shorten(one.span.reason, 80)}" if one.span.reason else ""
    head = f"step {number(one.span.step):>7}  {format_plural(one.samples, 'sample'):>11}  {_cause(one)}{incident}"
    return f"{head}{reason}  {names}{more}"
