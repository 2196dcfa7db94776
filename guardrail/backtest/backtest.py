"""Runs the live controller over a recorded run: what it would have decided, row by row.

A recorded run had no guard, so the controller runs in mode `advise`. It decides what `auto`
would have done, keeps the rows that it would have skipped out of its baselines, and continues with
the rows that followed. A run directory with its own settings is judged as in the live run, with the
actions that were taken (see `rejudge`).
"""

from __future__ import annotations

import time
from array import array

from guardrail.backtest.importers.recorded_log import Log, options_for_log
from guardrail.backtest.rejudge import Rejudge, Watch
from guardrail.backtest.result import NOTE, Alarm, BacktestIncident, BacktestResult
from guardrail.core.config import check_guard_options
from guardrail.core.events.decisions import CLOSED
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.controller import Controller
from guardrail.decide.policy import format_evidence
from guardrail.rundir.run_directory import RunDirectory


def run_backtest(
    log: Log, options: GuardOptions, *, own: bool = False, watch: Watch | None = None
) -> BacktestResult:
    """Run the controller over a log.

    Args:
        own: `log` is a run directory and `options` are its own: judge it as in the live run.
        watch: called before each row that is judged.

    Raises:
        ConfigError: options that contradict each other.
    """
    options = options_for_log(log, check_guard_options(options))
    result = BacktestResult(
        path=log.path,
        format=log.format,
        steps=log.steps,
        names=log.names,
        further=log.further,
        other_rows=log.other_rows,
        policy_column=log.policy_column,
    )
    began = time.perf_counter()
    if log.folder is not None:
        _judge_run(log, result, options, own=own, watch=watch)
    else:
        _judge_log(log, result, options, watch=watch)
    result.seconds = time.perf_counter() - began
    return result


def _judge_log(
    log: Log, result: BacktestResult, options: GuardOptions, *, watch: Watch | None
) -> None:
    mode = Mode.ADVISE
    if options.mode is Mode.OFF:
        mode = Mode.OFF
    controller = Controller(options, mode=mode)
    recorder = _VerdictRecorder(result)
    for row, observation in log.observations():
        if watch is not None:
            watch(row, controller.bands())
        verdict = controller.observe(observation)
        if verdict.findings or verdict.incident_state:
            recorder.record_verdict(row, verdict)
    if "loss" in log.columns:
        result.loss = controller.detector_set.signed_loss.loss_kind


def _judge_run(
    log: Log, result: BacktestResult, options: GuardOptions, *, own: bool, watch: Watch | None
) -> None:
    assert log.folder is not None
    rejudge = Rejudge(RunDirectory.open(log.folder), options, own=own, watch=watch)
    recorder = _VerdictRecorder(result)
    differing = []
    for judged in rejudge:
        if not judged.agrees:
            differing.append(judged.row)
        if judged.verdict.findings or judged.verdict.incident_state:
            recorder.record_verdict(judged.row, judged.verdict)
    result.messages += rejudge.lost
    if own:
        result.differing = differing


class _VerdictRecorder:
    """Turns verdicts into the alarms and incidents of a result."""

    def __init__(self, result: BacktestResult) -> None:
        self._result = result
        self._incidents: dict[int, BacktestIncident] = {}

    def record_verdict(self, row: int, verdict: Verdict) -> None:
        if verdict.findings:
            self._record_alarm(_make_alarm(self._result.steps, row, verdict), verdict)
        if verdict.incident is None or verdict.incident_state not in CLOSED:
            return
        incident = self._incidents.get(verdict.incident)
        # One that ended with a higher loss may recover later. It was over before.
        if incident is not None and incident.over is None:
            incident.over = row

    def _record_alarm(self, alarm: Alarm, verdict: Verdict) -> None:
        self._result.alarms.append(alarm)
        number = verdict.incident
        if number is None:
            if alarm.verdict == NOTE:
                self._result.notes += 1
                return
            number = -alarm.row - 1  # a batch without a label belongs to no incident
        incident = self._incidents.get(number)
        if incident is None:
            incident = self._incidents[number] = BacktestIncident(alarm, alarm, alarm)
            self._result.incidents.append(incident)
        incident.add_alarm(alarm)


def _make_alarm(steps: array[int], row: int, verdict: Verdict) -> Alarm:
    finding = verdict.findings[0]
    onset = verdict.onset
    if onset is None:
        onset = finding.onset
    onset_step = min(verdict.step, onset)
    return Alarm(
        row=row,
        step=verdict.step,
        onset_row=_find_onset_row(steps, row, onset_step),
        onset_step=onset_step,
        kind=name_finding_kind(finding),
        signal=finding.signal,
        verdict=_name_verdict(verdict),
        score=finding.score,
        threshold=finding.threshold,
        value=finding.value,
        baseline=finding.baseline,
        incident=verdict.incident,
        before_step=verdict.before_step,
        evidence=format_evidence(verdict.findings),
    )


def _name_verdict(verdict: Verdict) -> str:
    action = verdict.action
    if action in (Action.APPLY, Action.FP16_OVERFLOW) and verdict.would is not None:
        action = verdict.would
    if action is Action.APPLY:
        return NOTE
    return action.value


def name_finding_kind(finding: Finding) -> str:
    """Return the name of a finding's kind in JSON."""
    if finding.kind is FindingKind.NONFINITE:
        return "nan"
    return finding.kind.value


def _find_onset_row(steps: array[int], row: int, onset: int) -> int:
    """Return the first row, of those with rising steps up to `row`, that is not before the onset."""
    while row > 0 and onset <= steps[row - 1] <= steps[row]:
        row -= 1
    return row
