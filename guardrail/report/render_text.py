"""The report as plain text for a terminal, a pager or a mail. Pure: all text of a report is cleaned
already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guardrail.report.cause_sentences import describe_incident
from guardrail.report.command_list import HEADS as COMMAND_HEADS
from guardrail.report.command_list import list_commands, list_effects
from guardrail.report.formats import COLUMNS, shorten, wrap_text
from guardrail.report.incident import Incident
from guardrail.report.incident_details import Table, detail_incident
from guardrail.report.model import Report
from guardrail.report.summary import (
    align_commands,
    describe_checkpoints,
    describe_commands,
    describe_incidents,
    describe_numbers,
    describe_reason,
    describe_run,
    list_next_commands,
)
from guardrail.report.table_rows import (
    HEADS,
    Row,
    choose_costliest,
    costliest_first,
    count_rest,
    make_rows,
)
from guardrail.report.text_table import format_table, measure_width

LINES = 25  # of a summary, without the curve
MAX_ROWS, LEAST_ROWS = 8, 3  # of its table
LONGEST_PARAGRAPH = 7  # lines
_INDENT = "   "
_RIGHT = (0, 1)  # columns of numbers


def render_summary(report: Report, *, spec: str, chart: Sequence[str] = ()) -> str:
    """Return the summary, at most LINES lines of COLUMNS characters.

    Args:
        spec: what names the run on a command line.
        chart: lines of the loss curve, which come after the numbers; they count extra.
    """
    head = [*_head_lines(report)]
    foot = [*_foot_lines(report, spec)]
    rows = make_rows(report)
    table = _fit_table(rows, LINES - len(head) - len(foot))
    room = LINES - len(head) - len(table) - len(foot)
    lines = [*head, *(["", *chart] if chart else []), *table]
    lines += _fit_paragraphs(report, rows, room)
    return "\n".join([*lines, *foot])


def _head_lines(report: Report) -> Iterator[str]:
    yield from wrap_text(describe_run(report))[:2]
    yield from wrap_text(describe_numbers(report))[:2]
    for reason in describe_reason(report):
        yield shorten(reason, COLUMNS)
    yield from wrap_text(describe_incidents(report))[:2]


def _foot_lines(report: Report, spec: str) -> Iterator[str]:
    for at, line in enumerate((describe_checkpoints(report), describe_commands(report))):
        if line:
            yield from ["", shorten(line, COLUMNS)][at:]
    commands = list_next_commands(report, spec)
    if commands:
        yield "Next:" if " RUN" not in commands[0][0] else "Next (RUN is the path of this run):"
        yield from align_commands(commands)


def _fit_table(rows: Sequence[Row], room: int) -> list[str]:
    """Return an empty line, and the table with as many rows as fit into `room` lines."""
    for count in range(min(MAX_ROWS, len(rows)), LEAST_ROWS - 1, -1):
        lines = _table_lines(rows, count)
        if len(lines) <= room:
            return lines
    return _table_lines(rows, min(LEAST_ROWS, len(rows)))


def _table_lines(rows: Sequence[Row], count: int) -> list[str]:
    if not rows:
        return []
    shown = choose_costliest(rows, count)
    cells = [row.cells() for row in shown]
    if measure_width(HEADS, cells) > COLUMNS:
        cells = [row.cells(short=True) for row in shown]
    lines = format_table(HEADS, cells, right=_RIGHT)
    kept = {id(row) for row in shown}
    rest = [row for row in rows if id(row) not in kept]
    if rest:
        lines.append(shorten(f"{_INDENT}{count_rest(rest)}", COLUMNS))
    return ["", *lines]


def _fit_paragraphs(report: Report, rows: Sequence[Row], room: int) -> list[str]:
    """Return an empty line and the paragraphs of the incidents in the table, in at most `room`
    lines.

    Paragraphs are shortened first, then omitted. Those of the costliest incidents stay.
    """
    found = _list_paragraphs(report, rows)
    for longest in range(LONGEST_PARAGRAPH, 1, -1):
        lines = [line for paragraph in found for line in fit_paragraph(paragraph, longest)]
        if len(lines) < room:
            if lines:
                return ["", *lines]
            return []
    kept: dict[int, list[str]] = {}
    free = room - 1
    for row in costliest_first(rows):
        for place, paragraph in enumerate(found):
            lines = fit_paragraph(paragraph, 2)
            if paragraph.time == row.time and place not in kept and len(lines) <= free:
                kept[place] = lines
                free -= len(lines)
    lines = [line for place in sorted(kept) for line in kept[place]]
    if lines:
        return ["", *lines]
    return []


@dataclass(frozen=True, kw_only=True)
class _TimedParagraph:
    time: float
    title: str
    sentences: tuple[str, ...]


def _list_paragraphs(report: Report, rows: Sequence[Row]) -> list[_TimedParagraph]:
    """Give the paragraphs of the incidents and restarts that have a row in the table, in its order."""
    shown = {(row.kind, row.time) for row in choose_costliest(rows, MAX_ROWS)}
    found = []
    for incident in report.incidents:
        if ("incident", incident.opened) in shown:
            number = ""
            if incident.number:
                number = f"#{incident.number} "
            said = describe_incident(incident)
            found.append((incident.opened, number + said.title, said.sentences))
    for restart in report.restarts:
        if restart.differs:
            title = f"Restart at step {restart.step:,}: the state differs from the saved one"
            found.append((restart.time, title, restart.differs))
    ordered = sorted(found, key=lambda one: one[0])
    return [
        _TimedParagraph(time=time, title=title, sentences=sentences)
        for time, title, sentences in ordered
    ]


def fit_paragraph(paragraph: _TimedParagraph, count: int) -> list[str]:
    """Return the heading, and below it as many sentences as fit into `count` lines."""
    title = wrap_text(paragraph.title)[: min(2, count)]
    best = title
    for many in range(1, len(paragraph.sentences) + 1):
        lines = wrap_text(" ".join(paragraph.sentences[:many]), indent=_INDENT)
        if len(title) + len(lines) > count:
            return best
        best = [*title, *lines]
    return best


# -- one incident


def render_incident(report: Report, incident: Incident, *, excerpts: bool = False) -> str:
    """Return the paragraph of one incident, and its tables."""
    details = detail_incident(incident)
    lines = [*wrap_text(f"{report.run}, {details.title[:1].lower()}{details.title[1:]}"), ""]
    lines += wrap_text(details.paragraph.title)
    lines += wrap_text(" ".join(details.paragraph.sentences), indent=_INDENT)
    for fact in details.facts:
        lines += wrap_text(fact, indent=_INDENT)
    for table in details.tables:
        lines += ["", *render_table(table, excerpts=excerpts)]
    return "\n".join(lines)


def render_table(table: Table, *, excerpts: bool = False) -> list[str]:
    lines = [table.title]
    lines += format_table(table.heads, table.rows, right=table.right, indent="  ")
    if table.rest:
        lines += wrap_text(table.rest, indent="  ")
    if excerpts and table.excerpts:
        lines.append("Excerpts")
        for name, text in table.excerpts:
            lines += wrap_text(f'{name}: "{text}"', indent="  ")
    return lines


# -- what users did


def render_commands(report: Report) -> str:
    """Return commands, what they skipped and restored, and notes."""
    lines = [*wrap_text(describe_run(report))]
    rows = list(list_commands(report))
    if rows:
        lines += ["", "Commands", *format_table(COMMAND_HEADS, rows, right=(0,), indent="  ")]
    for title, said in (("By command", [*list_effects(report)]), ("Notes", report.notes)):
        if said:
            lines += ["", title, *(line for one in said for line in wrap_text(one, indent="  "))]
    if len(lines) <= 2:
        lines += ["", "No commands and no notes."]
    return "\n".join(lines)
