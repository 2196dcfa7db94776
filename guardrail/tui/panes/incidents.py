"""The pane of the incidents: what happened and what was done. Small screens show two rows of it."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import format_count
from guardrail.report.incident import Incident
from guardrail.tui.draw.lines import Piece, Row, fit_row, make_row, wrap_text
from guardrail.tui.model.incident_list import IncidentSummary, format_skipped
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.run_story import ASKS
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import (
    Fact,
    empty_row,
    entry_marker,
    named_facts,
    pane_title,
    pointer,
    wrapped_fact_rows,
)
from guardrail.tui.panes.incident_evidence import evidence_facts, format_finding
from guardrail.tui.panes.pane import Pane

# State of an incident -> how it stands in the table.
_STATES: dict[str, Piece] = {
    "open": ("▲ open", "warn"),
    "recovered": ("✓ recovered", "good"),
    "recovered with higher loss": ("▲ higher loss", "warn"),
    "repeated": ("▲ repeated", "bad"),
}
NO_OPEN_INCIDENT = "the journal has no open incident"
_MOST_LINES = 3  # findings, and rows of names of documents, in the table
_SEARCHED_CELLS = 400  # of a row that the filter searches


def _matching_incidents(view: View, state: PaneState) -> list[IncidentSummary]:
    known = view.snapshot.story.incidents
    if not state.filter:
        return list(known)
    return [one for one in known if state.shows(_text(view, one))]


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """Return the selected incident (else the newest) in full, the others in two rows each."""
    incidents = _matching_incidents(view, state)
    if not incidents:
        return [pane_title("incidents", width, state), empty_row(state, "none", width)]
    count: Row = ((str(len(incidents)), "dim"),)
    rows = [pane_title("incidents", width, state, right=count)]
    full = min(state.cursor or 0, len(incidents) - 1)
    blocks: list[list[Row]] = []
    for index, incident in enumerate(incidents[: full + height]):
        marked = state.focused and index == state.cursor
        lines = _incident_rows(view, incident, width, full=index == full, marked=marked)
        blocks.append([(entry_marker(index), *line) for line in lines])
    first = 0
    while first < full and sum(map(len, blocks[first : full + 1])) > height - 1:
        first += 1
    for block in blocks[first:]:
        if len(rows) + len(block) > height and len(rows) > 1:
            break
        rows += block
    return rows[:height]


def _describe(view: View, incident: IncidentSummary, width: int) -> list[Row]:
    """Return all evidence of an incident: findings, cause, actions, samples, outcome."""
    recorded = _recorded(view, incident)
    facts = _summary_facts(incident)
    if recorded is not None:
        facts = evidence_facts(recorded)
    return [_head_row(view, incident, width), *wrapped_fact_rows(facts, width)]


def newest_evidence_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Return all evidence of the newest incident, which the guard's question is about."""
    known = view.snapshot.story.incidents
    if not known or not known[0].open:
        return [((f" {NO_OPEN_INCIDENT}", "dim"),)]
    return _describe(view, known[0], width)


def newest_incident_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Return the newest incident in two rows, for a screen without panes."""
    known = view.snapshot.story.incidents
    if not known:
        return [((" no incidents", "dim"),)]
    return [_head_row(view, known[0], width), *_finding_rows(known[0], width)[:1]]


def _summary_facts(incident: IncidentSummary) -> list[Fact]:
    """Return the facts of an incident to which the journal gave no number."""
    actions = [text for text in (incident.action, incident.answered) if text]
    facts = named_facts("findings", map(format_finding, incident.findings))
    facts += named_facts("actions", actions)
    if incident.samples:
        facts.append(("skipped", format_skipped(incident)))
    return facts + named_facts("documents", incident.documents)


def _recorded(view: View, incident: IncidentSummary) -> Incident | None:
    """Return what the journal says about an incident in full."""
    if incident.number <= 0:
        return None
    return view.snapshot.story.known.incidents.get(incident.number)


def _text(view: View, incident: IncidentSummary) -> str:
    head = "".join(text for text, _ in _head_row(view, incident, _SEARCHED_CELLS))
    return " ".join([head, *map(format_finding, incident.findings)])


def _incident_rows(
    view: View, incident: IncidentSummary, width: int, *, full: bool, marked: bool
) -> list[Row]:
    head = _head_row(view, incident, width, marked=marked)
    findings = _finding_rows(incident, width)
    if not full:
        return [head, *findings[:1]]
    rows = [head, *findings]
    recorded = _recorded(view, incident)
    if recorded is not None and recorded.outcome:
        rows.append(fit_row(make_row((f"    {recorded.outcome}", "dim")), width))
    return rows + _document_rows(incident, width)


def _document_rows(incident: IncidentSummary, width: int) -> list[Row]:
    if not incident.documents:
        return []
    names = ", ".join(incident.documents)
    more = incident.documents_total - len(incident.documents)
    if more > 0:
        names += f" and {more:,} more"
    lines = wrap_text(names, width - 5)
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1] += " …"
    return [fit_row(make_row((f"    {line}", "dim")), width) for line in lines[:_MOST_LINES]]


def _head_row(view: View, incident: IncidentSummary, width: int, *, marked: bool = False) -> Row:
    """Return `#2  step 1,207  ✓ recovered  rolled back to 1,200`."""
    recorded = _recorded(view, incident)
    state = ("▲ open", "warn") if incident.open else ("✓ over", "good")
    cause = ""
    if recorded is not None:
        if (recorded.state != "open") is not incident.open:
            state = _STATES.get(recorded.state, state)
        if recorded.cause:
            cause = f"  {recorded.cause}"
    name = f"#{incident.label}" if incident.label else "–"
    line: Row = (
        pointer(marked),
        (f"{name:<3} ", "strong"),
        (f"step {format_count(incident.step)}  ", "plain"),
        state,
        (f"  {_action_words(incident)}", "plain"),
        (cause, "dim"),
    )
    return fit_row(line, width)


def _action_words(incident: IncidentSummary) -> str:
    """Return what was done last; the answer replaces the words that the guard asks."""
    if not incident.answered:
        return incident.action
    if incident.action == ASKS:
        return incident.answered
    return f"{incident.answered}, then {incident.action}"


def _finding_rows(incident: IncidentSummary, width: int) -> list[Row]:
    """Return the findings, then what was skipped. The first row stands for all on a small screen."""
    texts = [format_finding(finding) for finding in incident.findings[:_MOST_LINES]]
    if skipped := format_skipped(incident):
        texts.append(skipped)
    return [fit_row(make_row((f"    {text}", "plain")), width) for text in texts]


PANE = Pane(
    "incidents",
    "what happened and what was done",
    _matching_incidents,
    _build,
    describe=_describe,
    step_of=lambda incident: incident.step,
)
