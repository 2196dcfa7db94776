"""Proposes thresholds for recorded runs: counts the alarms of each, and takes the lowest one that
rarely rejects a single harmless record.

Without labels, nothing shows which alarm was right. A threshold decides about the single outlier
that is gone with the next records. To reject it costs an update and gains nothing. So the lowest
threshold (the most sensitive one) is chosen at which such single rejections stay within a budget.
All other settings keep their defaults. What stays, grows or is NaN is found at any of these
thresholds. It is counted separately.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from guardrail.backtest.backtest import run_backtest
from guardrail.backtest.importers.recorded_log import Log
from guardrail.backtest.result import NOTE, BacktestIncident, BacktestResult
from guardrail.core.format import format_plural
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.core.section import replace_key

BUDGET = 1.0  # single rejections in 10,000 records that a run may cost
LONE = 2  # most rows of a single rejection
TABLE = "detectors.spike"  # of [guard]
# Key of that table -> (the signal that it judges, the values that are tried). The values are about a
# factor of 1.25 apart, around the default.
TRIED = {
    "loss_threshold": (LOSS, (5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0)),
    "grad_threshold": (GRAD_NORM, (6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0)),
    "embed_threshold": (EMBED_GRAD_NORM, (6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0)),
}


@dataclass(frozen=True)
class Trial:
    """The alarms of one value of one key, over all logs.

    Attributes:
        lone: single rejections on the signal that the key judges.
        severe: other incidents that were acted on, of any signal.
    """

    value: float
    lone: int
    severe: int
    notes: int


@dataclass(frozen=True)
class Proposal:
    """One key: every value that was tried, and the proposed one.

    Attributes:
        records: that have the signal.
    """

    name: str
    signal: str
    default: float
    trials: tuple[Trial, ...]
    value: float
    records: int

    def is_within(self, budget: float) -> bool:
        """Return whether single rejections at the proposed value stay within the budget."""
        proposed = next(trial for trial in self.trials if trial.value == self.value)
        return 1e4 * proposed.lone <= budget * self.records


def propose_thresholds(
    logs: Sequence[Log],
    options: GuardOptions,
    *,
    budget: float = BUDGET,
    report: Callable[[str], None] = lambda text: None,
) -> list[Proposal]:
    """Try thresholds on all logs, one key at a time.

    Args:
        options: the values of all keys that are not tried.
        budget: single rejections in 10,000 records.
        report: called with each value that is tried.
    """
    proposals = []
    for name, (signal, values) in TRIED.items():
        records = _count_records(logs, signal)
        if not records:
            continue
        default = float(getattr(options.detectors.spike, name))
        trials = []
        for value in sorted({*values, default}):
            report(f"{name} = {value:g}")
            tried = replace_key(options, f"{TABLE}.{name}", value)
            results = [run_backtest(log, tried) for log in logs]
            trials.append(_count_alarms(value, results, signal))
        within = [trial.value for trial in trials if 1e4 * trial.lone <= budget * records]
        if within:
            chosen = min(within)
        else:
            chosen = max(trial.value for trial in trials)
        proposals.append(Proposal(name, signal, default, tuple(trials), chosen, records))
    return proposals


def _count_records(logs: Sequence[Log], signal: str) -> int:
    """Return how many records have this signal."""
    count = 0
    for log in logs:
        if signal in log.columns:
            count += len(log) - log.columns[signal].missing
    return count


def _count_alarms(value: float, results: Sequence[BacktestResult], signal: str) -> Trial:
    incidents = [one for result in results for one in result.incidents if one.acted is not None]
    lone = [one for one in incidents if _is_single_rejection(one)]
    alarms = [alarm for result in results for alarm in result.alarms]
    return Trial(
        value=value,
        lone=sum(one.worst.signal == signal for one in lone),
        severe=len(incidents) - len(lone),
        notes=sum(alarm.verdict == NOTE for alarm in alarms),
    )


def _is_single_rejection(incident: BacktestIncident) -> bool:
    rows = incident.last.row - incident.first.row
    return not incident.rollbacks and rows < LONE and incident.worst.kind != "nan"


def format_toml(
    proposals: Sequence[Proposal], logs: Sequence[Log], *, budget: float = BUDGET
) -> Iterator[str]:
    """Give the lines of a file for `--config`, or for a configuration. Comments show the numbers."""
    records = sum(len(log) for log in logs)
    yield (
        f"# Proposed by `guardrail tune` from {format_plural(len(logs), 'log')},"
        f" {format_plural(records, 'record')}."
    )
    yield (
        "# Each value is the lowest at which single rejections stay within"
        f" {budget:g} in 10,000 records."
    )
    spaced = sum(_median_spacing(log) > 1 for log in logs)
    if spaced:
        yield "#"
        yield f"# {spaced} of the logs hold only every n-th step, or means over n steps. A live run"
        yield "# has every step and more noise. Do not go below the defaults because of such logs."
    yield f"[guard.{TABLE}]"
    for proposal in proposals:
        yield ""
        yield f"# {'score':>7} {'single':>7} {'other':>7} {'notes':>7}   ({proposal.signal})"
        for trial in proposal.trials:
            yield _format_trial(trial, proposal)
        if not proposal.is_within(budget):
            yield "# No value stays within the budget: the highest one is proposed."
        yield f"{proposal.name} = {proposal.value!r}"
    if not proposals:
        judged = ", ".join(signal for signal, _ in TRIED.values())
        yield f"# Nothing is proposed: thresholds exist for {judged}, and the logs have none of them."


def _format_trial(trial: Trial, proposal: Proposal) -> str:
    marks = []
    if trial.value == proposal.default:
        marks.append("default")
    if trial.value == proposal.value:
        marks.append("proposed")
    numbers = f"{trial.value:>7g} {trial.lone:>7,} {trial.severe:>7,} {trial.notes:>7,}"
    return f"# {numbers}   {', '.join(marks)}".rstrip()


def _median_spacing(log: Log) -> float:
    """Return the median difference between the steps of consecutive records."""
    gaps = sorted(b - a for a, b in itertools.pairwise(log.steps) if b > a)
    if not gaps:
        return 1
    return gaps[len(gaps) // 2]
