"""A recorded run through the live controller: what it would have said, row by row, and what that
would have cost.

A recorded run was not acted on, so the controller runs as in `advise`: it says what `auto` would
have done, keeps what it would have left out away from its baselines, and follows the run through
what came next. A run directory under its own settings is judged as it was live, with what was done
(see `rejudge`).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guardrail.backtest.importers.recorded_log import Log, options_for_log
from guardrail.backtest.rejudge import Rejudge, Watch
from guardrail.core.config import check_guard_options
from guardrail.core.events.decisions import CLOSED
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import Action, Finding, FindingKind, Mode, Verdict
from guardrail.decide.controller import Controller
from guardrail.decide.policy import format_evidence
from guardrail.detectors.build import OWN_SIGNALS
from guardrail.detectors.signed_loss import LossKind
from guardrail.rundir.run_directory import RunDirectory

NOTE = "note"
ACTS = (Action.SKIP, Action.ROLLBACK, Action.PAUSE, Action.HALT)


class Alarm(NamedTuple):
    """What was said of one row. `verdict` is "note", "skip", "rollback", "pause" or "halt"."""

    row: int
    step: int
    onset_row: int
    onset_step: int
    kind: str
    signal: str
    verdict: str
    score: float
    threshold: float
    value: float
    baseline: float
    incident: int | None
    before_step: int | None  # of a rollback: the state to go back to is older than this step
    evidence: str  # what was found, as the beginning of a sentence

    def as_dict(self) -> dict[str, Any]:
        names = (
            "row",
            "step",
            "onset_row",
            "onset_step",
            "kind",
            "signal",
            "verdict",
            "score",
            "threshold",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(slots=True)
class Case:
    """Alarms of one incident.

    What is counted is counted up to the first rollback or halt: what the run would have met after
    it, no log can tell.

    Attributes:
        first, last: its alarms.
        worst: the gravest of them.
        rows: rows with an alarm.
        skips, rollbacks: updates that would have been left out; 1 if it would have come to a
        rollback or a halt.
        given_up: recorded steps that would have been left out or made again.
        acted: the first alarm that was more than a note, None if there is none.
        over: row at which it was over, None if the log ends before.
    """

    first: Alarm
    last: Alarm
    worst: Alarm
    rows: int = 0
    skips: int = 0
    rollbacks: int = 0
    given_up: int = 0
    acted: Alarm | None = None
    over: int | None = None

    def add(self, alarm: Alarm) -> None:
        self.rows += 1
        self.last = alarm
        if _grave(alarm) > _grave(self.worst):
            self.worst = alarm
        if alarm.verdict != NOTE and self.acted is None:
            self.acted = alarm
        if self.rollbacks:
            return
        if alarm.verdict == Action.SKIP:
            self.skips += 1
            self.given_up += 1
        elif alarm.verdict != NOTE:
            self.rollbacks = 1
            target = alarm.onset_step if alarm.before_step is None else alarm.before_step
            self.given_up += max(1, alarm.step - target + 1)


@dataclass
class Result:
    """What the controller said of one log.

    Attributes:
        steps: of every record, in file order; `Alarm.row` is an index into it.
        cases: incidents, oldest first; notes outside of one are counted in `notes`.
        beside: further signals that the log records and that are not judged -> their columns.
        apart: rows that are no record of training -> how many.
        loss: what kind of number the loss was taken for; None where nothing says.
        policy: the column that showed that it is signed.
        seconds: that the controller took, reading not included.
        differing: of a run directory under its own settings: rows whose live verdict was another;
        None otherwise.
    """

    path: str
    format: str
    steps: array[int]
    names: dict[str, str]
    alarms: list[Alarm] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    notes: int = 0
    said: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)
    apart: dict[str, int] = field(default_factory=dict)
    loss: LossKind | None = None
    policy: str = ""
    seconds: float = 0.0
    differing: list[int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The layout of `guardrail backtest --json`."""
        result: dict[str, Any] = {
            "path": self.path,
            "records": len(self.steps),
            "steps": self.steps.tolist(),
            "alarms": [alarm.as_dict() for alarm in self.alarms],
            "seconds": round(self.seconds, 3),
            "format": self.format,
            "columns": self.names,
            "recorded_only": self.beside,
            "rows_apart": self.apart,
            "loss": None if self.loss is None else self.loss.value,
        }
        if self.differing is not None:
            result["differing_from_live"] = self.differing
        return result

    def saved(self, case: Case) -> int:
        """Steps that the recorded run spent in trouble after the first time that it would have been
        acted on.

        At most that much would have been saved, if the remedy had worked; nothing can know whether
        it would have.
        """
        if case.acted is None:
            return 0
        last = len(self.steps) - 1 if case.over is None else case.last.row
        return max(0, self.steps[last] - case.acted.step)


def backtest(
    log: Log, settings: GuardOptions, *, own: bool = False, watch: Watch | None = None
) -> Result:
    """Run the controller over a log.

    Args:
        own: `log` is a run directory and `settings` are its own: judge it as it was live.
        watch: called before each row that is judged.

    Raises:
        ConfigError: settings that cannot be.
    """
    settings = check_guard_options(settings)
    result = Result(path=log.path, format=log.format, steps=log.steps, names=log.names)
    result.beside, result.apart, result.policy = log.further, log.other_rows, log.policy_column
    settings = options_for_log(log, settings)
    began = time.perf_counter()
    if log.folder is not None:
        _rejudge(log, result, settings, own=own, watch=watch)
    else:
        controller = Controller(
            settings, mode=Mode.OFF if settings.mode is Mode.OFF else Mode.ADVISE
        )
        observe = controller.observe
        book = _Book(result)
        for row, obs in log.observations():
            if watch is not None:
                watch(row, controller.bands())
            verdict = observe(obs)
            if verdict.findings or verdict.incident_state:
                book.enter(row, verdict)
        if "loss" in log.columns:
            result.loss = controller.detector_set.signed_loss.loss_kind
    result.seconds = time.perf_counter() - began
    return result


def _rejudge(
    log: Log, result: Result, settings: GuardOptions, *, own: bool, watch: Watch | None
) -> None:
    assert log.folder is not None
    judge = Rejudge(RunDirectory.open(log.folder), settings, own=own, watch=watch)
    book = _Book(result)
    differing = []
    for judged in judge:
        if own and not judged.agrees:
            differing.append(judged.row)
        if judged.verdict.findings or judged.verdict.incident_state:
            book.enter(judged.row, judged.verdict)
    result.said += judge.lost
    result.differing = differing if own else None


class _Book:
    """Verdicts -> alarms and cases."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._cases: dict[int, Case] = {}

    def enter(self, row: int, verdict: Verdict) -> None:
        if verdict.findings:
            self._alarm(row, verdict)
        case = self._cases.get(verdict.incident) if verdict.incident is not None else None
        # One that ended with an offset may recover later; it was over before.
        if verdict.incident_state in CLOSED and case is not None and case.over is None:
            case.over = row

    def _alarm(self, row: int, verdict: Verdict) -> None:
        said = _said(verdict)
        finding = verdict.findings[0]
        onset_step = min(verdict.step, finding.onset if verdict.onset is None else verdict.onset)
        alarm = Alarm(
            row=row,
            step=verdict.step,
            onset_row=_row_of(self._result.steps, row, onset_step),
            onset_step=onset_step,
            kind=kind_of(finding),
            signal=finding.signal,
            verdict=said,
            score=finding.score,
            threshold=finding.threshold,
            value=finding.value,
            baseline=finding.baseline,
            incident=verdict.incident,
            before_step=verdict.before_step,
            evidence=format_evidence(verdict.findings),
        )
        self._result.alarms.append(alarm)
        if verdict.incident is None:
            self._result.notes += said == NOTE
            if said == NOTE:
                return
        # a batch without a label
        number = verdict.incident if verdict.incident is not None else -row - 1
        case = self._cases.get(number)
        if case is None:
            case = self._cases[number] = Case(alarm, alarm, alarm)
            self._result.cases.append(case)
        case.add(alarm)


def _said(verdict: Verdict) -> str:
    action = verdict.action
    if action in (Action.APPLY, Action.FP16_OVERFLOW) and verdict.would is not None:
        action = verdict.would
    return NOTE if action is Action.APPLY else action.value


def kind_of(finding: Finding) -> str:
    """What the JSON calls a finding's kind."""
    return "nan" if finding.kind is FindingKind.NONFINITE else finding.kind.value


def _row_of(steps: array[int], row: int, onset: int) -> int:
    """The first row of the stretch that leads to `row` whose step is not before the onset."""
    while row > 0 and onset <= steps[row - 1] <= steps[row]:
        row -= 1
    return row


def _grave(alarm: Alarm) -> int:
    return -1 if alarm.verdict == NOTE else ACTS.index(Action(alarm.verdict))


# -- for a person ----------------------------------------------------------------------------------


def lines(result: Result) -> Iterator[str]:
    """One line an incident, under one that names the log."""
    steps = result.steps
    watched = ", ".join(result.names.values()) or "nothing"
    span = f", steps {min(steps):,} to {max(steps):,}" if len(steps) else ""
    apart = "".join(f"; {_rows(count, kind)}" for kind, count in result.apart.items())
    yield f"{result.path}: {len(steps):,} records{span} ({result.format}; {watched}{apart})"
    if result.loss is LossKind.SIGNED:
        why = f"the column {result.policy} shows it" if result.policy else "its values show it"
        yield f"  the loss is signed, {why}: it may be 0 or negative, and its ratios are not judged (guard.loss)"
    asked = [
        signal
        for signal in result.names
        if signal not in OWN_SIGNALS and result.format != "guardrail run"
    ]
    if asked:
        yield f"  noted only, where far above the usual: {', '.join(asked)}"
    if result.beside:
        names = ", ".join(
            f"{signal} ({name})" if signal != name else name
            for signal, name in result.beside.items()
        )
        yield f"  recorded only, not judged: {names}; --column SIGNAL=NAME notes spikes of one"
    for case in result.cases:
        yield f"  {_line(result, case)}"
    if result.notes:
        yield f"  {result.notes} note{'s' if result.notes > 1 else ''} besides"
    if result.differing is not None:
        count = len(result.differing)
        yield f"  {'all verdicts are' if not count else f'{count} verdicts are not'} those that fell live"


def _rows(count: int, kind: str) -> str:
    name = {"evaluation": "of an evaluation", "summary": "with a summary"}.get(
        kind, "without a signal"
    )
    return f"{count:,} row{'s' if count != 1 else ''} {name} not judged"


def _line(result: Result, case: Case) -> str:
    worst = case.worst
    onset = min(case.first.onset_step, case.first.step)
    acted = "noted only" if case.acted is None else f"acted on at step {case.acted.step:,}"
    end = "to the end of the log" if case.over is None else f"over after step {case.last.step:,}"
    return (
        f"step {onset:>9,}  {worst.verdict:<8}  {worst.kind:<11}  {worst.evidence}; {acted}, {end}"
    )


def summary(results: list[Result]) -> dict[str, int]:
    """Sums over logs: see `Case` and `Result.saved` for what they mean."""
    cases = [(result, case) for result in results for case in result.cases]
    return {
        "logs": len(results),
        "records": sum(len(result.steps) for result in results),
        "incidents": sum(case.acted is not None for _, case in cases),
        "skips": sum(case.skips for _, case in cases),
        "rollbacks": sum(case.rollbacks for _, case in cases),
        "notes": sum(alarm.verdict == NOTE for result in results for alarm in result.alarms),
        "steps_given_up": sum(case.given_up for _, case in cases),
        "steps_saved_at_most": sum(result.saved(case) for result, case in cases),
    }


def summary_lines(results: list[Result]) -> list[str]:
    figures = summary(results)
    records = figures["records"]
    acts = figures["skips"] + figures["rollbacks"]
    rate = f"{1e4 * acts / records:.1f} times in 10,000" if records else "never"
    return [
        f"{figures['logs']} log{'s' if figures['logs'] != 1 else ''}, {records:,} records: would have acted in "
        f"{figures['incidents']:,} incidents ({figures['skips']:,} updates left out, {figures['rollbacks']:,} "
        f"rollbacks or halts: {rate}) and noted {figures['notes']:,}",
        f"given up: {figures['steps_given_up']:,} recorded steps, left out or made again",
        f"saved: at most {figures['steps_saved_at_most']:,} steps, which the runs spent in trouble after the first act",
    ]
