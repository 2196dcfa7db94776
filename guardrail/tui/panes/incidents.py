"""Pane 2: what went wrong and what was done; also the two lines of it that a small screen has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from guardrail.core.format import clean_and_shorten, format_plural, format_time_of_day
from guardrail.core.format import format_count as number
from guardrail.core.records import Finding, score_words
from guardrail.report import incident as casefile
from guardrail.tui.draw.lines import Piece, Row, fit_row, make_row, wrap_text
from guardrail.tui.model.incident_list import IncidentSummary, format_skipped
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.run_story import ASKS
from guardrail.tui.model.view import View, signal_label
from guardrail.tui.numerics.scales import format_short
from guardrail.tui.panes.frame import entry_marker, pane_title

# State of an incident -> how it stands in the table.
_STATES: dict[str, Piece] = {
    "open": ("▲ open", "warn"),
    "recovered": ("✓ recovered", "good"),
    "recovered with higher loss": ("▲ higher loss", "warn"),
    "repeated": ("▲ repeated", "bad"),
}


def found(view: View, state: PaneState) -> list[IncidentSummary]:
    known = view.snapshot.story.incidents
    return [one for one in known if state.shows(_text(view, one))] if state.filter else list(known)


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def step(view: View, state: PaneState) -> int | None:
    incidents = found(view, state)
    return (
        incidents[state.cursor].step
        if state.cursor is not None and state.cursor < len(incidents)
        else None
    )


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """The marked one (else the newest) in full, the others in two lines each."""
    incidents = found(view, state)
    rows = [
        pane_title(
            "incidents", width, state, right=((str(len(incidents)), "dim"),) if incidents else ()
        )
    ]
    if not incidents:
        return [*rows, ((" none" if not state.filter else " none like that", "dim"),)]
    full = min(state.cursor or 0, len(incidents) - 1)
    blocks = [
        _incident(
            view,
            incident,
            width,
            full=index == full,
            marked=state.focused and index == state.cursor,
        )
        for index, incident in enumerate(incidents[: full + height])
    ]
    blocks = [
        [(entry_marker(index), *line) for line in block] for index, block in enumerate(blocks)
    ]
    first = 0
    while first < full and sum(map(len, blocks[first : full + 1])) > height - 1:
        first += 1
    for block in blocks[first:]:
        if len(rows) + len(block) > height and len(rows) > 1:
            break
        rows += block
    return rows[:height]


def detail(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """All evidence of the marked incident: seen, cause, done, left out, and how it ended."""
    incidents = found(view, state)
    if state.cursor is None or state.cursor >= len(incidents):
        return []
    return _in_full(view, incidents[state.cursor], width)


def evidence(view: View, width: int, height: int) -> Sequence[Row]:
    """The same of the newest incident, which is the one that the guard asks about, if it is
    open.
    """
    known = view.snapshot.story.incidents
    if not known or not known[0].open:
        return [((" the journal tells of no open incident", "dim"),)]
    return _in_full(view, known[0], width)


def _in_full(view: View, incident: IncidentSummary, width: int) -> list[Row]:
    case = _case(view, incident)
    head = [_head(view, incident, width)]
    parts = _evidence_of(case) if case is not None else _summary_of(incident)
    for name, lines in parts:
        for index, text in enumerate(lines):
            label = f"   {name if not index else '':<10}"
            indent = " " * (len(text) - len(text.lstrip(" ")))
            for at, line in enumerate(wrap_text(text.lstrip(" "), width - 14 - len(indent))):
                head.append(make_row((label if not at else " " * 13, "dim"), indent + line))
    return head


def newest(view: View, width: int, height: int) -> Sequence[Row]:
    """The newest incident in two rows, for a screen without a side."""
    known = view.snapshot.story.incidents
    if not known:
        return [((" no incidents", "dim"),)]
    return [_head(view, known[0], width), *_short(known[0], width)[:1]]


# -- in full


def _evidence_of(case: casefile.Incident) -> Iterator[tuple[str, list[str]]]:
    """(what, its lines) in the order in which a person asks."""
    yield (
        "seen",
        [_finding(finding) for finding in case.findings] or ["nothing that the journal tells"],
    )
    if case.parameters:
        yield "in", [f"rank {rank}: {', '.join(names)}" for rank, names in case.parameters.items()]
    if case.tokens:
        yield "tokens", [token.sentence() for token in case.tokens]
    if case.cause:
        yield "cause", [f"{case.cause}: {case.cause_reason}" if case.cause_reason else case.cause]
    if case.actions:
        done = [
            f"{format_time_of_day(one.time)}  {one.sentence or one.action}" for one in case.actions
        ]
        yield "done", done[-12:]
    if remedies := [remedy for action in case.actions for remedy in action.remedies]:
        yield "remedy", list(dict.fromkeys(remedies))
    if case.samples:
        yield "left out", list(_left_out(case))
    if case.named:
        yield "samples", [line for sample in case.named[:16] for line in _sample(sample)]
    if case.documents:
        more = max(0, case.documents_total - len(case.documents))
        names = [line for document in case.documents for line in _document(document)]
        yield "documents", [*names, f"and {more:,} more"] if more else names
    yield "outcome", [case.outcome or {"open": "not over yet"}.get(case.state, case.state)]
    if case.measured:
        yield (
            "measured",
            [
                ", ".join(
                    f"{name.replace('_', ' ')} {format_short(x)}"
                    for name, x in case.measured.items()
                )
            ],
        )


def _summary_of(incident: IncidentSummary) -> Iterator[tuple[str, list[str]]]:
    """Of an incident to which the journal gave no number."""
    yield "seen", [_finding(finding) for finding in incident.findings]
    if incident.action or incident.answered:
        yield "done", [text for text in (incident.action, incident.answered) if text]
    if incident.samples:
        yield "left out", [format_skipped(incident)]
    if incident.documents:
        yield "documents", list(incident.documents)


def _left_out(case: casefile.Incident) -> Iterator[str]:
    of = f" of {format_plural(case.documents_total, 'document')}" if case.documents_total else ""
    yield format_plural(case.samples, "sample") + of
    for span in case.spans[:6]:
        chosen = f", {len(span.positions)} of them" if span.positions else ""
        stretch = f"positions {number(span.first)} to {number(max(span.first, span.last - 1))}"
        yield f"{stretch}{chosen} ({clean_and_shorten(span.origin, 20)})"


def _sample(sample: casefile.Sample) -> Iterator[str]:
    share = f", {100 * sample.share:.0f} % of the trouble" if math.isfinite(sample.share) else ""
    yield f"position {number(sample.position)}: loss {format_short(sample.loss)}{share}"
    if sample.odd:
        yield f"  odd: {', '.join(sample.odd)}"
    for document in sample.documents[:2]:
        yield from (f"  {line}" for line in _document(document))
    if sample.excerpt and all(
        sample.excerpt != document.excerpt for document in sample.documents[:2]
    ):
        yield f"  “{sample.excerpt}”"


def _document(document: casefile.Document) -> Iterator[str]:
    record = f":{document.record}" if document.record else ""
    stretch = (
        f"  bytes {document.first_byte:,}-{document.last_byte:,}" if document.last_byte else ""
    )
    yield f"{document.path}{record}{stretch}"
    if document.excerpt:
        yield f"  “{document.excerpt}”"


# -- in the table


def _case(view: View, incident: IncidentSummary) -> casefile.Incident | None:
    return view.snapshot.story.known.cases.get(incident.number) if incident.number > 0 else None


def _text(view: View, incident: IncidentSummary) -> str:
    return " ".join(
        ["".join(text for text, _ in _head(view, incident, 400)), *map(_finding, incident.findings)]
    )


def _incident(
    view: View, incident: IncidentSummary, width: int, *, full: bool, marked: bool
) -> list[Row]:
    rows = [_head(view, incident, width, marked=marked)]
    evidence = _short(incident, width)
    rows += evidence[:4] if full else evidence[:1]
    case = _case(view, incident)
    if full and case is not None and case.outcome:
        rows.append(fit_row(make_row((f"    {case.outcome}", "dim")), width))
    if full and incident.documents:
        more = incident.documents_total - len(incident.documents)
        names = ", ".join(incident.documents) + (f" and {more:,} more" if more > 0 else "")
        lines = wrap_text(names, width - 5)
        rows += [make_row((f"    {line}", "dim")) for line in lines[:3]]
        if len(lines) > 3:
            rows[-1] = fit_row(make_row((f"    {lines[2]} …", "dim")), width)
    return rows


def _head(view: View, incident: IncidentSummary, width: int, *, marked: bool = False) -> Row:
    name = f"#{incident.number}" if incident.number > 0 else "–"
    case = _case(view, incident)
    state = ("▲ open", "warn") if incident.open else ("✓ over", "good")
    if case is not None and (case.state != "open") is not incident.open:
        state = _STATES.get(case.state, state)
    left: Row = (
        ("▸" if marked else " ", "key"),
        (f"{name:<3} ", "strong"),
        (f"step {number(incident.step)}  ", "plain"),
        state,
    )
    cause = f"  {case.cause}" if case is not None and case.cause else ""
    action = incident.action
    if incident.answered:
        # That it asks is over: how it was answered stands in its place.
        action = incident.answered if action == ASKS else f"{incident.answered}, then {action}"
    return fit_row((*left, (f"  {action}", "plain"), (cause, "dim")), width)


def _short(incident: IncidentSummary, width: int) -> list[Row]:
    """Findings, then what was left out. The narrow view shows the first line only, so it holds
    both.
    """
    told = [_finding(finding) for finding in incident.findings[:3]]
    if data := format_skipped(incident):
        told.append(data)
    return [fit_row(make_row((f"    {text}", "plain")), width) for text in told]


def _finding(finding: Finding) -> str:
    """ "loss 2.31 → 11.5, score 41 (limit 8)" """
    signal = signal_label(finding.signal)
    where = f" on rank {', '.join(map(str, finding.ranks))}" if finding.ranks else ""
    if not math.isfinite(finding.value):
        return f"{signal}: {format_short(finding.value)}{where}"
    return (
        f"{signal} {format_short(finding.baseline)} → {format_short(finding.value)}{where}, "
        f"{score_words(finding.score, finding.threshold)}"
    )
