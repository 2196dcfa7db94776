"""Pane 2: what went wrong and what was done; also the two lines of it that a small screen has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.records import Finding
from guardrail.tui.format import brief
from guardrail.tui.format import count as number
from guardrail.tui.lines import Piece, Row, fit, row, wrap
from guardrail.tui.panes.frame import heading
from guardrail.tui.panes.state import State
from guardrail.tui.scales import short
from guardrail.tui.story import Incident, left_out
from guardrail.tui.view import View


def found(view: View, state: State) -> list[Incident]:
    return [incident for incident in view.snapshot.story.incidents if state.shows(_text(incident))]


def count(view: View, state: State) -> int:
    return len(found(view, state))


def step(view: View, state: State) -> int | None:
    incidents = found(view, state)
    return incidents[state.cursor].step if state.cursor is not None and state.cursor < len(incidents) else None


def build(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    """The marked one (else the newest) in full, the others in two lines each."""
    incidents = found(view, state)
    rows = [heading("incidents", width, state, right=((str(len(incidents)), "dim"),) if incidents else ())]
    if not incidents:
        return [*rows, ((" none" if not state.filter else " none like that", "dim"),)]
    full = min(state.cursor or 0, len(incidents) - 1)
    blocks = [
        _incident(incident, width, full=index == full, marked=state.focused and index == state.cursor)
        for index, incident in enumerate(incidents[: full + height])
    ]
    first = 0
    while first < full and sum(map(len, blocks[first : full + 1])) > height - 1:
        first += 1
    for block in blocks[first:]:
        if len(rows) + len(block) > height and len(rows) > 1:
            break
        rows += block
    return rows


def detail(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    """All evidence of the marked incident."""
    incidents = found(view, state)
    if state.cursor is None or state.cursor >= len(incidents):
        return []
    incident = incidents[state.cursor]
    texts = [_finding(finding) for finding in incident.findings]
    texts += [left_out(incident)] if incident.samples else []
    texts += incident.documents
    return [_head(incident, width), *(row(f"   {line}") for text in texts for line in wrap(text, width - 4))]


def newest(view: View, width: int, height: int) -> Sequence[Row]:
    """The newest incident in two rows, for a screen without a side."""
    known = view.snapshot.story.incidents
    if not known:
        return [((" no incidents", "dim"),)]
    return [_head(known[0], width), *_evidence(known[0], width)[:1]]


def _text(incident: Incident) -> str:
    return " ".join(["".join(text for text, _ in _head(incident, 400)), *map(_finding, incident.findings)])


def _incident(incident: Incident, width: int, *, full: bool, marked: bool) -> list[Row]:
    rows = [_head(incident, width, marked=marked)]
    evidence = _evidence(incident, width)
    rows += evidence[:4] if full else evidence[:1]
    if full and incident.documents:
        more = incident.documents_total - len(incident.documents)
        names = ", ".join(incident.documents) + (f" and {more:,} more" if more > 0 else "")
        lines = wrap(names, width - 5)
        rows += [row((f"    {line}", "dim")) for line in lines[:3]]
        if len(lines) > 3:
            rows[-1] = fit(row((f"    {lines[2]} …", "dim")), width)
    return rows


def _head(incident: Incident, width: int, *, marked: bool = False) -> Row:
    name = f"#{incident.number}" if incident.number > 0 else "–"
    state: Piece = ("▲ open", "warn") if incident.open else ("✓ over", "good")
    left: Row = (
        ("▸" if marked else " ", "key"),
        (f"{name:<3} ", "strong"),
        (f"step {number(incident.step)}  ", "plain"),
        state,
    )
    return fit((*left, (f"  {incident.deed}", "plain")), width)


def _evidence(incident: Incident, width: int) -> list[Row]:
    """Findings, then what was left out. The narrow view shows the first line only, so it holds both."""
    told = [_finding(finding) for finding in incident.findings[:3]]
    if data := left_out(incident):
        told.append(data)
    return [fit(row((f"    {text}", "plain")), width) for text in told]


def _finding(finding: Finding) -> str:
    """ "loss 2.31 → 11.5, score 41 over 8" """
    signal = brief(finding.signal, 40).replace("_", " ")
    where = f" on rank {', '.join(map(str, finding.ranks))}" if finding.ranks else ""
    if not math.isfinite(finding.value):
        return f"{signal}: {short(finding.value)}{where}"
    return (
        f"{signal} {short(finding.baseline)} → {short(finding.value)}{where}, "
        f"score {short(finding.score)} over {short(finding.threshold)}"
    )
