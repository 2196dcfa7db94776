"""Everything about one incident as a paragraph and short tables. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guardrail.core.format import format_duration, format_number, format_plural, format_share
from guardrail.core.records.findings import Finding, FindingKind
from guardrail.report.cause_sentences import Paragraph, describe_incident
from guardrail.report.formats import format_signal, shorten_path
from guardrail.report.incident import Incident, IncidentAction, SkippedFile, Token
from guardrail.report.table_rows import describe_state

MAX_ROWS = 16  # of a table; JSON has all rows
MAX_TOKENS = 3
MAX_NAMES = 4  # parameters of a rank
PATH_WIDTH = 60
_ACTIONS = {
    "retry": "batch repeated",
    "pause": "paused to ask the user",
    "halt": "run halted",
    "rollback": "older state restored",
}
# kinds that the name of the signal does not show
_KINDS = (FindingKind.DIVERGENCE, FindingKind.LEVEL_SHIFT, FindingKind.GROWTH, FindingKind.STUCK)


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
    number = "Incident without a number"
    if incident.number:
        number = f"Incident {incident.number}"
    tables = (
        _make_signals(incident),
        _make_decisions(incident),
        _make_documents(incident),
        _make_tokens(incident),
    )
    return IncidentDetails(
        title=f"{number}: step {incident.onset:,}, {describe_state(incident)}",
        paragraph=describe_incident(incident),
        facts=tuple(_list_facts(incident)),
        tables=tuple(table for table in tables if table.rows),
    )


def _list_facts(incident: Incident) -> Iterator[str]:
    """Give one sentence each for cost, effect, and the origin of NaN and Inf."""
    if cost := describe_cost(incident):
        yield f"Cost: {cost}."
    if effect := describe_effect(incident):
        yield effect
    for rank, module in incident.modules.items():
        yield f"First non-finite output on rank {rank}: {module}."
    for rank, names in _find_own_parameters(incident).items():
        more = ""
        if len(names) > MAX_NAMES:
            more = f" and {len(names) - MAX_NAMES} more"
        yield f"Non-finite gradients on rank {rank}: {', '.join(names[:MAX_NAMES])}{more}."


def _find_own_parameters(incident: Incident) -> dict[str, list[str]]:
    """Return rank -> parameters with non-finite gradients, only for ranks that a finding names.

    The reduction gives the NaN of one rank to all ranks.
    """
    ranks = {str(rank) for finding in incident.findings for rank in finding.ranks}
    own = {rank: names for rank, names in incident.parameters.items() if rank in ranks}
    return own or incident.parameters


def describe_cost(incident: Incident) -> str:
    """Return "3 steps discarded, 12 samples skipped, 1.3 s of training lost", of what was measured."""
    cost = incident.cost
    parts = []
    if cost.steps:
        parts = [f"{format_plural(cost.steps, 'step')} discarded"]
    if cost.rejected:
        parts.append(f"{format_plural(cost.rejected, 'update')} rejected")
    if incident.samples:
        parts.append(f"{format_plural(incident.samples, 'sample')} skipped")
    if cost.seconds >= 0:
        parts.append(f"{format_duration(cost.seconds)} of training lost")
    if cost.parked:
        parts.append(f"{format_duration(cost.parked)} waiting for an answer")
    return ", ".join(parts)


def describe_effect(incident: Incident) -> str:
    """Return the losses compared with the trend, and whether the actions were worth their cost."""
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


def _make_signals(incident: Incident) -> Table:
    findings = incident.findings[:MAX_ROWS]
    heads: tuple[str, ...] = ("signal", "step", "value", "normal", "score", "limit")
    has_ranks = any(finding.ranks for finding in findings)
    rows = [_signal_cells(finding) for finding in findings]
    if has_ranks:
        heads = (*heads, "ranks")
        rows = [(*row, _list_ranks(finding)) for row, finding in zip(rows, findings, strict=True)]
    return Table(
        title="Signals",
        heads=heads,
        rows=tuple(rows),
        right=(1, 2, 3, 4, 5),
        rest=_count_more(len(incident.findings), "signal"),
    )


def _list_ranks(finding: Finding) -> str:
    return ", ".join(map(str, finding.ranks[:8])) or "-"


def _signal_cells(finding: Finding) -> tuple[str, ...]:
    name = format_signal(finding.signal)
    if finding.kind in _KINDS:
        name += f", {finding.kind.value.replace('_', ' ')}"
    if finding.severity.value == "note":
        name += " (noted)"
    judged = (finding.baseline, finding.score, finding.threshold)
    if finding.threshold > 0:
        numbers = [format_number(one) for one in judged]
    else:
        numbers = ["-", "-", "-"]
    return (name, f"{finding.step:,}", format_number(finding.value), *numbers)


def _make_decisions(incident: Incident) -> Table:
    rows: list[tuple[str, ...]] = []
    for number, action in enumerate(incident.actions[:MAX_ROWS], 1):
        rows.append(_decision_cells(number, action))
        rows += [("", "", "", "", "", remedy) for remedy in action.remedies]
    return Table(
        title="Decisions (a rejected batch does not advance the step)",
        heads=("try", "step", "positions", "signal", "value", "decision"),
        rows=tuple(rows),
        right=(0, 1, 4),
        rest=_count_more(len(incident.actions), "decision"),
    )


def _decision_cells(number: int, action: IncidentAction) -> tuple[str, ...]:
    first, last = action.batch or action.window or (0, 0)
    if action.action == "rollback" and action.window is not None:
        first, last = action.window
    positions = "-"
    if first < last:
        positions = f"{first:,}-{last - 1:,}"
    decision = describe_decision(action)
    if not action.signal:
        return (str(number), f"{action.step:,}", positions, "-", "-", decision)
    # The journal has the number of the step before the rejected one.
    step, signal = f"{action.step + 1:,}", format_signal(action.signal)
    return (str(number), step, positions, signal, format_number(action.value), decision)


def describe_decision(action: IncidentAction) -> str:
    """Return what a decision did: "16 samples skipped", "restored step 220 (memory), 12 steps
    discarded, 112 skipped".
    """
    skipped = action.samples_skipped
    if action.action in ("rollback", "undo") and action.to_step is not None:
        done = "undo: restored"
        if action.action == "rollback":
            done = "restored"
        tier = ""
        if action.tier:
            tier = f" ({action.tier})"
        lost = format_plural(action.steps_lost, "step")
        said = f"{done} step {action.to_step:,}{tier}, {lost} discarded"
        if skipped >= 0:
            return f"{said}, {skipped:,} skipped"
        return said
    parts = [_describe_action(action)]
    if skipped >= 0:
        parts.append(f"{format_plural(skipped, 'sample')} skipped")
    if action.batch is not None and 0 <= skipped < action.batch[1] - action.batch[0]:
        parts.append(f"{action.batch[1] - action.batch[0] - skipped:,} kept")
    return ", ".join(part for part in parts if part)


def _describe_action(action: IncidentAction) -> str:
    if action.action == "skip":
        if action.samples_skipped >= 0:
            return ""
        return "batch skipped"
    if action.action.startswith("would "):
        return f"{action.action} (advise)"
    if action.action == "remedy":
        if action.remedies:
            return "remedies"
        return action.sentence
    return _ACTIONS.get(action.action, action.sentence or action.action)


def _make_documents(incident: Incident) -> Table:
    files = incident.files[:MAX_ROWS]
    rest = _count_more(len(incident.files), "file")
    if incident.documents_total > len(incident.documents):
        known = (
            f"only {len(incident.documents):,} of the "
            f"{format_plural(incident.documents_total, 'document')}"
        )
        if rest:
            rest = f"{rest}; the journal lists {known}"
        else:
            rest = f"the journal lists {known}"
    return Table(
        title="Documents",
        heads=("file", "bytes skipped", "remark"),
        rows=tuple(_file_cells(file) for file in files),
        right=(1,),
        rest=rest,
        excerpts=tuple((file.shown, text) for file in files for text in file.excerpts),
    )


def _file_cells(file: SkippedFile) -> tuple[str, ...]:
    records = ""
    if file.records:
        records = f" ({format_plural(file.records, 'record')})"
    size = "-"
    if file.bytes:
        size = f"{file.bytes:,}"
    return (f"{shorten_path(file.shown, PATH_WIDTH)}{records}", size, file.remark or "-")


def _make_tokens(incident: Incident) -> Table:
    there = sorted((token for token in incident.tokens if token.count), key=_share_first)
    return Table(
        title="Tokens",
        heads=("token", "share of the embedding gradient", "in the batch"),
        rows=tuple(_token_cells(token) for token in there[:MAX_TOKENS]),
        right=(2,),
    )


def _share_first(token: Token) -> float:
    if math.isfinite(token.share):
        return -token.share
    return 0.0


def _token_cells(token: Token) -> tuple[str, ...]:
    share = "-"
    if math.isfinite(token.share):
        share = f"up to {format_share(token.share)}"
    count = "-"
    if token.count >= 0:
        count = f"{token.count:,}"
    if token.text:
        named = f'{token.id} "{token.text}"'
    else:
        named = str(token.id)
    return (named, share, count)


def _count_more(count: int, noun: str) -> str:
    if count > MAX_ROWS:
        return f"and {format_plural(count - MAX_ROWS, noun)} more"
    return ""


def find_incident(incidents: Sequence[Incident], number: int) -> Incident | None:
    return next((one for one in incidents if one.number == number and number > 0), None)
