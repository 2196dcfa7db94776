"""Pane 5: where the run is in its data, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.tui.format import count as number
from guardrail.tui.format import metric, plural
from guardrail.tui.lines import Row, fit, row
from guardrail.tui.panes.frame import heading, marked, window
from guardrail.tui.panes.state import State
from guardrail.tui.story import Incident, left_out
from guardrail.tui.view import View


def found(view: View, state: State) -> list[Incident]:
    """Incidents that left data out, newest first."""
    told = [incident for incident in view.snapshot.story.incidents if incident.samples]
    return [incident for incident in told if state.shows(_text(incident))]


def count(view: View, state: State) -> int:
    return len(found(view, state))


def build(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    rows = [heading("data", width, state)]
    status = view.status
    if status is not None:
        rows.append(fit(row(f" position {number(status.cursor)}   {metric(status.tokens)} tokens applied"), width))
    quarantined = found(view, state)
    if not quarantined:
        return [*rows, row((" nothing left out", "dim"))]
    for index in window(len(quarantined), height - len(rows), state):
        rows.append(fit(marked(row(_text(quarantined[index])), index, state), width))
    return rows


def _text(incident: Incident) -> str:
    return f"step {number(incident.step)}  {left_out(incident) or plural(incident.samples, 'sample')}"
