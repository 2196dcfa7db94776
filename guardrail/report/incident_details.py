"""Everything about one incident as a paragraph and short tables. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guardrail.core.records import Finding
from guardrail.core.text import plural
from guardrail.report.cause_sentences import Paragraph, describe_incident
from guardrail.report.formats import (
    format_duration,
    format_number,
    format_share,
    format_signal,
    shorten_path,
)
from guardrail.report.incident import Incident, IncidentAction, SkippedFile, Token
from guardrail.report.table_rows import describe_state

MAX_ROWS = 16  # of a table; JSON has all that the journal named
MAX_TOKENS = 3
MAX_NAMES = 4  # parameters of a rank
PATH_WIDTH = 60


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table. `right`: numbers of the columns aligned to the right; `rest`: a line after
    it; `excerpts`: (whose, text), text of the data itself.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()
    rest: str = ""
    excerpts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class IncidentDetails:
    """`title` names the incident, `paragraph` says what it was."""

    title: str
    paragraph: Paragraph
    facts: tuple[str, ...]
    tables: tuple[Table, ...]


def detail_incident(incident: Incident) -> IncidentDetails:
    number = f"Incident {incident.number}" if incident.number else "Incident without a number"
    tables = (
        _signals(incident),
        _decisions(incident),
        _documents(incident),
        _tokens(incident),
    )
    return IncidentDetails(
        title=f"{number}: step {incident.onset:,}, {describe_state(incident)}",
        paragraph=describe_incident(incident),
        facts=tuple(_facts(incident)),
        tables=tuple(table for table in tables if table.rows),
    )


def _facts(incident: Incident) -> Iterator[str]:
    """What it cost and what it was worth, and where NaN and Inf came from: a sentence each."""
    if cost := describe_cost(incident):
        yield f"Cost: {cost}."
    if effect := describe_effect(incident):
        yield effect
    for rank, module in incident.modules.items():
        yield f"First non-finite output on rank {rank}: {module}."
    for rank, names in _own_parameters(incident).items():
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        yield f"Non-finite gradients on rank {rank}: {', '.join(names[:MAX_NAMES])}{more}."


def _own_parameters(incident: Incident) -> dict[str, list[str]]:
    """Of the ranks that findings name: the reduction hands a NaN of one rank to all."""
    ranks = {str(rank) for finding in incident.findings for rank in finding.ranks}
    own = {rank: names for rank, names in incident.parameters.items() if rank in ranks}
    return own or incident.parameters


def describe_cost(incident: Incident) -> str:
    """ "3 steps discarded, 12 samples skipped, 1.3 s of training", as far as it was measured."""
    cost = incident.cost
    parts = [f"{plural(cost.steps, 'step')} discarded"] if cost.steps else []
    parts += [f"{plural(cost.rejected, 'update')} rejected"] if cost.rejected else []
    parts += [f"{plural(incident.samples, 'sample')} skipped"] if incident.samples else []
    parts += [f"{format_duration(cost.seconds)} of training"] if cost.seconds >= 0 else []
    parts += [f"{format_duration(cost.parked)} waiting for an answer"] if cost.parked else []
    return ", ".join(parts)


def describe_effect(incident: Incident) -> str:
    """The losses against the trend, and whether what was done was worth its cost."""
    effect = incident.effect
    if effect is None:
        return ""
    price = ""
    if incident.cost.steps:
        price = f" Progress of the discarded steps: {format_number(effect.price)}."
    return (
        f"Loss against the trend, nats per token: {effect.excess:+.3g} in rejected and discarded "
        f"batches, {effect.offset:+.3g} after the incident.{price} Worth its cost: {effect.worth}."
    )


# -- tables


def _signals(incident: Incident) -> Table:
    findings = incident.findings[:MAX_ROWS]
    heads: tuple[str, ...] = ("signal", "step", "value", "normal", "score", "limit")
    has_ranks = any(finding.ranks for finding in findings)
    rows = [_signal(finding) for finding in findings]
    if has_ranks:
        heads = (*heads, "ranks")
        rows = [(*row, _ranks(finding)) for row, finding in zip(rows, findings, strict=True)]
    return Table(
        title="Signals",
        heads=heads,
        rows=tuple(rows),
        right=(1, 2, 3, 4, 5),
        rest=_count_more(len(incident.findings), "signal"),
    )


def _ranks(finding: Finding) -> str:
    return ", ".join(map(str, finding.ranks[:8])) or "-"


def _signal(finding: Finding) -> tuple[str, ...]:
    name = format_signal(finding.signal)
    if finding.severity.value == "note":
        name += " (noted)"
    judged = (finding.baseline, finding.score, finding.threshold)
    numbers = [format_number(one) for one in judged] if finding.threshold > 0 else ["-", "-", "-"]
    return (name, f"{finding.step:,}", format_number(finding.value), *numbers)


def _decisions(incident: Incident) -> Table:
    actions = incident.actions[:MAX_ROWS]
    return Table(
        title="Decisions (a rejected batch does not advance the step)",
        heads=("try", "step", "positions", "signal", "value", "decision"),
        rows=tuple(_decision(number, action) for number, action in enumerate(actions, 1)),
        right=(0, 1, 4),
        rest=_count_more(len(incident.actions), "decision"),
    )


def _decision(number: int, action: IncidentAction) -> tuple[str, ...]:
    first, last = action.batch or action.window or (0, 0)
    measured = bool(action.signal)
    # A decision on a step has the number of the step before it; a restored state is one.
    step = action.step + 1 if measured else action.step
    return (
        str(number),
        f"{step:,}",
        f"{first:,}-{last - 1:,}" if first < last else "-",
        format_signal(action.signal) if measured else "-",
        format_number(action.value) if measured else "-",
        describe_decision(action),
    )


def describe_decision(action: IncidentAction) -> str:
    """What a decision did: "16 samples skipped", "restored step 220 from memory, ..."."""
    parts = [_describe_action(action)]
    skipped = action.samples_skipped
    if skipped >= 0:
        parts.append(f"{plural(skipped, 'sample')} skipped")
    if action.batch is not None and 0 <= skipped < action.batch[1] - action.batch[0]:
        parts.append(f"{action.batch[1] - action.batch[0] - skipped:,} kept")
    parts += action.remedies
    return ", ".join(part for part in parts if part)


def _describe_action(action: IncidentAction) -> str:
    if action.action == "rollback" and action.to_step is not None:
        tier = f" from {action.tier}" if action.tier else ""
        return f"restored step {action.to_step:,}{tier} ({plural(action.steps_lost, 'step')} discarded)"
    if action.action == "skip":
        return "" if action.samples_skipped >= 0 else "batch skipped"
    if action.action == "retry":
        return "batch repeated"
    if action.action == "pause":
        return "paused to ask"
    if action.action == "halt":
        return "run halted"
    if action.action.startswith("would "):
        return f"{action.action} (advise)"
    return "" if action.remedies else action.sentence or action.action


def _documents(incident: Incident) -> Table:
    files = incident.files[:MAX_ROWS]
    rest = _count_more(len(incident.files), "file")
    if incident.documents_total > len(incident.documents):
        known = f"{len(incident.documents):,} of {plural(incident.documents_total, 'document')}"
        rest = f"{rest}; the journal names {known}" if rest else f"the journal names {known}"
    return Table(
        title="Documents",
        heads=("file", "bytes skipped", "remark"),
        rows=tuple(_file(file) for file in files),
        right=(1,),
        rest=rest,
        excerpts=tuple((file.shown, text) for file in files for text in file.excerpts),
    )


def _file(file: SkippedFile) -> tuple[str, ...]:
    records = f" ({plural(file.records, 'record')})" if file.records else ""
    size = f"{file.bytes:,}" if file.bytes else "-"
    return (f"{shorten_path(file.shown, PATH_WIDTH)}{records}", size, file.remark or "-")


def _tokens(incident: Incident) -> Table:
    there = [token for token in incident.tokens if token.count]
    return Table(
        title="Tokens",
        heads=("token", "share of the embedding gradient", "in the batch"),
        rows=tuple(_token(token) for token in there[:MAX_TOKENS]),
        right=(2,),
    )


def _token(token: Token) -> tuple[str, ...]:
    share = f"up to {format_share(token.share)}" if math.isfinite(token.share) else "-"
    count = f"{token.count:,}" if token.count >= 0 else "-"
    named = f'{token.id} "{token.text}"' if token.text else str(token.id)
    return (named, share, count)


def _count_more(count: int, noun: str) -> str:
    return f"and {plural(count - MAX_ROWS, noun)} more" if count > MAX_ROWS else ""


def find_incident(incidents: Sequence[Incident], number: int) -> Incident | None:
    return next((one for one in incidents if one.number == number and number > 0), None)
