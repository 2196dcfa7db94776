"""The report as headings, lines and tables, the same for every page format. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guardrail.report.command_list import HEADS as COMMAND_HEADS
from guardrail.report.command_list import list_commands, list_effects
from guardrail.report.incident import Incident
from guardrail.report.incident_details import Table, detail_incident
from guardrail.report.model import Report
from guardrail.report.summary import (
    describe_checkpoints,
    describe_commands,
    describe_incidents,
    describe_numbers,
    describe_reason,
    describe_run,
    list_next_commands,
)
from guardrail.report.table_rows import HEADS, make_rows


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading of `level` (1: the page), then paragraphs, tables and a list.

    Attributes:
        commands: (command, what it does).
        items: entries of a list.
    """

    title: str
    level: int = 2
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    items: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


def outline_report(report: Report, spec: str) -> Iterator[Section]:
    """Give the sections of a page: summary, details of each incident, commands, notes.

    Args:
        spec: what names the run on a command line.
    """
    yield _outline_summary(report, spec)
    for incident in report.incidents:
        yield _outline_incident(incident)
    differing = [restart for restart in report.restarts if restart.differs]
    for restart in differing:
        title = f"Restart at step {restart.step:,}: the state differs from the saved one"
        yield Section(title=title, items=restart.differs)
    commands = tuple(list_commands(report))
    if commands:
        table = Table(title="", heads=COMMAND_HEADS, rows=commands, right=(0,))
        yield Section(title="Commands", tables=(table,), items=tuple(list_effects(report)))
    elif report.by_person:
        yield Section(title="By command", items=tuple(list_effects(report)))
    if report.notes:
        yield Section(title="Notes", items=report.notes)


def _outline_summary(report: Report, spec: str) -> Section:
    said = (
        describe_numbers(report),
        *describe_reason(report),
        describe_incidents(report),
        describe_checkpoints(report),
        describe_commands(report).replace(" (list them with --commands)", ""),
    )
    rows = tuple(row.cells() for row in make_rows(report))
    table = Table(title="", heads=HEADS, rows=rows, right=(0, 1))
    return Section(
        title=describe_run(report),
        level=1,
        paragraphs=tuple(line for line in said if line),
        tables=(table,) if rows else (),
        commands=tuple(list_next_commands(report, spec)),
    )


def _outline_incident(incident: Incident) -> Section:
    details = detail_incident(incident)
    return Section(
        title=details.title,
        paragraphs=(
            f"{details.paragraph.title}.",
            " ".join(details.paragraph.sentences),
            *details.facts,
        ),
        tables=details.tables,
    )
