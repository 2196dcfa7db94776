"""Thresholds for recorded runs: how many alarms each would have given, and the lowest that leaves a
run in peace.

Without labels nothing says which alarm was right. What a threshold decides about is the outlier
that stands alone and is gone with the next records: it costs an update and gains nothing. So each
threshold is chosen as the lowest (the most watchful) at which such single rejections stay within a
budget, while everything else stands at its default. What stays, grows or is not a number is found
at any of these thresholds, and is counted beside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from guardrail.backtest.backtest import Case, Result, backtest
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.core.section import replace_key

BUDGET = 1.0  # single rejections in 10,000 records that a run should not mind
LONE = 2  # rows that a rejection which stands alone lasts at most
TABLE = "detectors.spike"  # of [guard]
# Key of that table -> (the signal that it judges, the values that are tried). Around the defaults, a factor
# of about 1.25 apart.
TRIED = {
    "loss_threshold": (LOSS, (5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0)),
    "grad_threshold": (GRAD_NORM, (6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0)),
    "embed_threshold": (EMBED_GRAD_NORM, (6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0)),
}


@dataclass(frozen=True)
class Trial:
    """What one value of one setting would have said of all logs.

    Attributes:
        lone: rejections that stood alone, on the signal that the setting judges.
        grave: incidents of any signal that were more than that.
    """

    value: float
    lone: int
    grave: int
    notes: int


@dataclass(frozen=True)
class Proposal:
    """One setting: all that was tried, and the value that is proposed."""

    name: str
    signal: str
    default: float
    trials: tuple[Trial, ...]
    value: float


def tune(
    logs: Sequence[Log],
    settings: GuardOptions,
    *,
    budget: float = BUDGET,
    say: Callable[[str], None] = lambda text: None,
) -> list[Proposal]:
    """Try thresholds on all logs, one setting at a time.

    Args:
        settings: where everything that is not tried stands.
        budget: lone rejections in 10,000 records.
        say: is told what is being tried.
    """
    proposals = []
    for name, (signal, values) in TRIED.items():
        records = sum(
            len(log) - log.columns[signal].missing for log in logs if signal in log.columns
        )
        if not records:
            continue
        default = float(getattr(settings.detectors.spike, name))
        trials = []
        for value in sorted({*values, default}):
            say(f"{name} = {value:g}")
            tried = replace_key(settings, f"{TABLE}.{name}", value)
            results = [backtest(log, tried) for log in logs]
            trials.append(_trial(value, results, signal))
        fit = [trial.value for trial in trials if 1e4 * trial.lone <= budget * records]
        chosen = min(fit) if fit else max(trial.value for trial in trials)
        proposals.append(Proposal(name, signal, default, tuple(trials), chosen))
    return proposals


def _trial(value: float, results: Sequence[Result], signal: str) -> Trial:
    cases = [case for result in results for case in result.cases if case.acted is not None]
    lone = [case for case in cases if _alone(case)]
    return Trial(
        value=value,
        lone=sum(case.worst.signal == signal for case in lone),
        grave=len(cases) - len(lone),
        notes=sum(alarm.verdict == "note" for result in results for alarm in result.alarms),
    )


def _alone(case: Case) -> bool:
    return not case.rollbacks and case.last.row - case.first.row < LONE and case.worst.kind != "nan"


def toml(
    proposals: Sequence[Proposal], logs: Sequence[Log], *, budget: float = BUDGET
) -> Iterator[str]:
    """The lines of a file for `--policy`, or to paste into a configuration; the evidence stands in
    comments.
    """
    records = sum(len(log) for log in logs)
    yield f"# Proposed by `guardrail tune` from {len(logs)} log{'s' if len(logs) != 1 else ''}, {records:,} records."
    yield f"# Each value is the lowest at which rejections that stand alone stay within {budget:g} in 10,000 records."
    spaced = [log.path for log in logs if _spacing(log) > 1]
    if spaced:
        yield "#"
        yield f"# {len(spaced)} of the logs tell only every n-th step, or means over n steps. A live run sees each,"
        yield "# and they are noisier: be slow to set anything lower than the default because of such logs."
    yield f"[guard.{TABLE}]"
    for proposal in proposals:
        yield ""
        yield f"# {'score':>7} {'alone':>7} {'more':>7} {'notes':>7}   ({proposal.signal})"
        for trial in proposal.trials:
            marks = ["default"] * (trial.value == proposal.default) + ["proposed"] * (
                trial.value == proposal.value
            )
            row = f"# {trial.value:>7g} {trial.lone:>7,} {trial.grave:>7,} {trial.notes:>7,}   {', '.join(marks)}"
            yield row.rstrip()
        yield f"{proposal.name} = {proposal.value!r}"
    if not proposals:
        yield "# The logs hold no signal that has a threshold."


def _spacing(log: Log) -> float:
    """Median distance of two records' steps."""
    gaps = sorted(b - a for a, b in itertools.pairwise(log.steps) if b > a)
    return gaps[len(gaps) // 2] if gaps else 1
