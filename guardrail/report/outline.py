"""A report as headings, facts and lists: what every page of it shows, whatever it is written in.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guardrail.report.incident import Incident
from guardrail.report.model import Report
from guardrail.report.render_text import (
    MAX_DEEDS,
    MAX_DOCUMENTS,
    command_line,
    cost_of,
    deed_line,
    document_line,
    finding_line,
    head_lines,
    restart_lines,
    sample_line,
    saved_by,
    shown_checkpoints,
    stretches_line,
    worth_of,
)


@dataclass(frozen=True, kw_only=True)
class Item:
    """An entry of a list; `quotes` is text of somebody's data, `more` what belongs below it."""

    text: str
    more: tuple[str, ...] = ()
    quotes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading of `level` (1: the page), facts as (label, text), and lists as (label, entries)."""

    title: str
    level: int = 2
    facts: tuple[tuple[str, str], ...] = ()
    lists: tuple[tuple[str, tuple[Item, ...]], ...] = ()


def outline(report: Report) -> Iterator[Section]:
    """All that a report says, most important first."""
    title, *head = head_lines(report)
    yield Section(
        title=title, level=1, lists=(("", tuple(Item(text=line.strip()) for line in head)),)
    )
    count = len(report.incidents)
    yield Section(title=f"Incidents ({count})" if count else "No incidents")
    for incident in report.incidents:
        yield _incident(incident)
    for name, lines in (
        (
            "Asked for by a person",
            [f"step {deed.step:,}: {deed.sentence}" for deed in report.by_person],
        ),
        ("Commands", [command_line(answer).strip() for answer in report.commands]),
        (
            "Restarts",
            [line.strip() for restart in report.restarts for line in restart_lines(restart)],
        ),
        ("Checkpoints", [line.strip() for line in shown_checkpoints(report.checkpoints)]),
        ("Also noted", list(report.troubles)),
    ):
        if lines:
            yield Section(title=name, lists=(("", tuple(Item(text=line) for line in lines)),))


def _incident(incident: Incident) -> Section:
    number = f"Incident {incident.number}" if incident.number else "Incident without a number"
    seen = [Item(text=finding_line(finding)) for finding in incident.findings]
    seen += [
        Item(text=f"rank {rank}: not finite: {', '.join(n)}")
        for rank, n in incident.parameters.items()
    ]
    seen += [Item(text=token.sentence()) for token in incident.tokens]
    done = [Item(text=deed_line(deed), more=deed.remedies) for deed in incident.deeds[:MAX_DEEDS]]
    if len(incident.deeds) > MAX_DEEDS:
        done.append(Item(text=f"and {len(incident.deeds) - MAX_DEEDS} more of the kind"))
    left = [
        Item(text=sample_line(sample), quotes=(sample.excerpt,) if sample.excerpt else ())
        for sample in incident.named[:MAX_DOCUMENTS]
    ]
    left += [
        Item(text=document_line(document), quotes=(document.excerpt,) if document.excerpt else ())
        for document in incident.documents[:MAX_DOCUMENTS]
    ]
    facts = (
        ("Cause", ": ".join(part for part in (incident.cause, incident.cause_reason) if part)),
        ("Cost", cost_of(incident)),
        ("Saved", saved_by(incident)),
        ("Worth it", worth_of(incident)),
        ("Outcome", incident.outcome or incident.state),
        ("Left out", stretches_line(incident)),
    )
    lists = (("Seen", tuple(seen)), ("Done", tuple(done)), ("Documents", tuple(left)))
    return Section(
        title=f"{number}: step {incident.onset:,}, {incident.state}",
        level=3,
        facts=tuple((label, text) for label, text in facts if text),
        lists=tuple((label, items) for label, items in lists if items),
    )
