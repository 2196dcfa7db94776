"""The table of the report: one row per incident, fault and restart. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from guardrail.core.format import format_duration, format_number, format_plural
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.report.cause_sentences import find_template
from guardrail.report.formats import format_signal, join_words
from guardrail.report.incident import Incident, IncidentAction
from guardrail.report.model import Fault, Report, Restart

HEADS = ("#", "step", "what happened", "cause", "action", "lost", "result")
_FIRST = (GRAD_NORM, LOSS, EMBED_GRAD_NORM)  # signals that are named before others
_DONE = {"halt": "run halted", "retry": "batch repeated"}
STATES = {"open": "not over"}
_URGENT = ("not over", "recovered with higher loss", "repeated")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Attributes:
    number: of an incident; 0: it has none.
    short: what happened, in fewer words.
    urgent: it is not over: such rows are shown first.
    seconds, weight: what it cost; the weight counts where the seconds are equal or unknown.
    """

    number: int
    step: int
    time: float
    what: str
    cause: str
    action: str
    seconds: float
    result: str
    kind: str
    short: str = ""
    urgent: bool = False
    weight: float = 0.0

    def cells(self, *, short: bool = False) -> tuple[str, ...]:
        if short and self.short:
            what = self.short
        else:
            what = self.what
        number = ""
        if self.number:
            number = str(self.number)
        lost = format_duration(self.seconds)
        return (number, f"{self.step:,}", what, self.cause, self.action, lost, self.result)


def make_rows(report: Report) -> list[Row]:
    """Return all rows in the order of time."""
    rows = [incident_row(incident) for incident in report.incidents]
    rows += [fault_row(fault, report) for fault in report.faults]
    rows += [restart_row(restart) for restart in report.restarts if restart.after != "failure"]
    return sorted(rows, key=lambda row: row.time)


def choose_costliest(rows: Sequence[Row], count: int) -> list[Row]:
    """Return at most `count` rows in their order: those that are not over, then the costliest."""
    order = sorted(rows, key=lambda row: (not row.urgent, -_known_seconds(row), -row.weight))
    chosen = {id(row) for row in order[:count]}
    return [row for row in rows if id(row) in chosen]


def costliest_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (not row.urgent, -_known_seconds(row), -row.weight))


def count_rest(rows: Sequence[Row]) -> str:
    """Return "and 30 incidents and 2 restarts that cost less, 12 s lost"."""
    kinds = Counter(row.kind for row in rows)
    named = join_words(format_plural(count, kind) for kind, count in kinds.items())
    measured = [row.seconds for row in rows if math.isfinite(row.seconds)]
    lost = ""
    if measured:
        lost = f", {format_duration(sum(measured))} lost"
    return f"and {named} that cost less{lost}"


def _known_seconds(row: Row) -> float:
    if math.isfinite(row.seconds):
        return row.seconds
    return 0.0


# -- incidents


def incident_row(incident: Incident) -> Row:
    return Row(
        number=incident.number,
        step=incident.onset,
        time=incident.opened,
        what=describe_findings(incident.findings),
        short=describe_findings(incident.findings, most=1),
        cause=find_template(incident).short,
        action=describe_actions(incident),
        seconds=incident.cost.total_seconds,
        result=describe_state(incident),
        kind="incident",
        urgent=STATES.get(incident.state, incident.state) in _URGENT,
        weight=incident.cost.steps + incident.samples + incident.cost.rejected,
    )


def describe_state(incident: Incident) -> str:
    """Return "recovered at 175", "not over"."""
    state = STATES.get(incident.state, incident.state)
    if incident.closed_step:
        return f"{state} at {incident.closed_step:,}"
    return state


def describe_findings(findings: Sequence[Finding], *, most: int = 2) -> str:
    """Return the most severe findings: "grad norm 1.1 -> 105, loss 2.27 -> 8.08"."""
    bad = [finding for finding in findings if finding.severity is not Severity.NOTE] or findings
    broken = [finding for finding in bad if finding.kind is FindingKind.NONFINITE]
    if broken:
        return _describe_nonfinite(broken)
    ranked = sorted(bad, key=lambda finding: finding.signal not in _FIRST)
    main = [f for f in ranked if f.signal in (GRAD_NORM, LOSS)] or ranked
    seen: dict[str, Finding] = {}
    for finding in main:
        seen.setdefault(finding.signal, finding)
    said = ", ".join(describe_finding(finding) for finding in list(seen.values())[:most])
    return said or "decided without a finding in the journal"


def describe_finding(finding: Finding) -> str:
    """Return one finding in a few words."""
    signal, value = format_signal(finding.signal), format_number(finding.value)
    change = f"{signal} {format_number(finding.baseline)} -> {value}"
    match finding.kind:
        case FindingKind.NO_TOKENS:
            return "no label token in the batch"
        case FindingKind.RESTART:
            return f"the step counter went back to {finding.step:,}"
        case FindingKind.NONFINITE:
            return f"{value} {signal}{_name_ranks(finding.ranks)}"
        case FindingKind.IMPOSSIBLE:
            return f"{signal} is {value}, which no model gives{_name_ranks(finding.ranks)}"
        case FindingKind.STUCK:
            return f"{signal} exactly {value} for {finding.score + 1:.0f} steps"
        case FindingKind.RESUME_JUMP:
            return f"{change} after the resume"
        case FindingKind.DIVERGENCE | FindingKind.LEVEL_SHIFT:
            return f"{change}, stays up"
        case FindingKind.GROWTH:
            return f"{change}, step by step"
        case _:
            return f"{change}{_name_ranks(finding.ranks)}"


def _describe_nonfinite(findings: Sequence[Finding]) -> str:
    loss = next((finding for finding in findings if finding.signal == LOSS), None)
    if loss is not None:
        return f"{format_number(loss.value)} loss{_name_ranks(loss.ranks)}"
    first = findings[0]
    return f"{format_number(first.value)} gradient{_name_ranks(first.ranks)}"


def _name_ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f" on rank {ranks[0]}"
    if len(ranks) > 3:
        return f" on {len(ranks):,} ranks"
    return f" on ranks {join_words(map(str, ranks))}"


def describe_actions(incident: Incident) -> str:
    """Return "restored 220, 208 skipped, rate x0.2", "119 samples skipped"."""
    said = list(dict.fromkeys(_describe_each(incident.actions)))
    undone = any(action.action == "undo" for action in incident.actions)
    if incident.samples:
        alone = not said and not undone
        if alone:
            skipped = format_plural(incident.samples, "sample")
        else:
            skipped = f"{incident.samples:,}"
        said.append(f"{skipped} skipped")
    said += dict.fromkeys(name for action in incident.actions for name in action.short_remedies)
    if undone:
        said.append("undone" if not incident.samples else "others undone")
    return ", ".join(said) or "none"


def _describe_each(actions: Sequence[IncidentAction]) -> Iterator[str]:
    """In words, without the skips, which samples count, and a question that was answered."""
    answered = any(action.action == "rollback" for action in actions)
    for action in actions:
        if action.action.startswith("would "):
            yield f"{action.action} (advise)"
        elif action.action == "rollback" and action.to_step is not None:
            yield f"restored {action.to_step:,}"
        elif action.action == "pause" and not answered:
            yield "asked the user"
        elif action.action in _DONE:
            yield _DONE[action.action]


# -- faults and restarts


def fault_row(fault: Fault, report: Report) -> Row:
    times = ""
    if fault.count > 1:
        times = f" ({fault.count:,} times)"
    is_rank = fault.kind.startswith("rank")
    message = fault.message
    if fault.host == report.host:
        message = message.removesuffix(f" on {fault.host}")
    what = message
    if not is_rank:
        what = f"{fault.kind}: {message}"
    following = next((r for r in report.restarts if is_rank and r.time >= fault.time), None)
    return Row(
        number=0,
        step=fault.step,
        time=fault.time,
        what=(what or fault.kind) + times,
        cause=fault.kind if is_rank else "disk",
        action=_describe_fault_action(fault, following),
        seconds=_measure_fault(fault, following),
        result=_describe_fault_result(fault, following),
        kind="fault",
        urgent=fault.resolved_step is None,
        weight=following.steps_lost if following is not None else 0,
    )


def _describe_fault_action(fault: Fault, restart: Restart | None) -> str:
    if restart is not None and fault.resolved_step is not None:
        return f"restarted from {restart.step:,}"
    return "none"


def _measure_fault(fault: Fault, restart: Restart | None) -> float:
    if not fault.kind.startswith("rank"):
        return math.nan
    parts = [fault.seconds, restart.seconds if restart is not None else math.nan]
    known = [part for part in parts if math.isfinite(part)]
    if known:
        return sum(known)
    return math.nan


def _describe_fault_result(fault: Fault, restart: Restart | None) -> str:
    if restart is not None and fault.resolved_step is not None:
        return f"{format_plural(restart.steps_lost, 'step')} repeated"
    if fault.kind.startswith("rank"):
        return "not continued"
    if fault.resolved_step is None:
        return "not resolved"
    return f"writable again at {fault.resolved_step:,}"


def restart_row(restart: Restart) -> Row:
    ended = "the run ended without a message"
    if restart.after:
        ended = f"the run was {restart.after}"
    result = "continued"
    if restart.differs:
        result = "state differs from the saved one"
    if restart.steps_lost:
        result += f", {format_plural(restart.steps_lost, 'step')} repeated"
    return Row(
        number=0,
        step=restart.step,
        time=restart.time,
        what=ended,
        cause="-",
        action=f"resumed from {restart.step:,}",
        seconds=restart.seconds,
        result=result,
        kind="restart",
        urgent=bool(restart.differs),
        weight=restart.steps_lost,
    )
