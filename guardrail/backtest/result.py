"""What the controller decided about one recorded run: alarms, and the incidents that they form."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guardrail.core.records.verdicts import Action
from guardrail.detectors.signed_loss import LossKind

NOTE = "note"
GOES_BACK = (Action.ROLLBACK, Action.PAUSE, Action.HALT)
# All but "apply", which is a note. The least severe first.
ACTS = (Action.FP16_OVERFLOW, Action.RETRY, Action.SKIP, *GOES_BACK)


class Alarm(NamedTuple):
    """The verdict on one row, if it is not to apply the update without a finding.

    Attributes:
        verdict: "note", "overflow", "retry", "skip", "rollback", "pause" or "halt".
        before_step: of a rollback: the state that it would restore is older than this step.
        evidence: the findings, as the beginning of a sentence.
    """

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
    before_step: int | None
    evidence: str

    def as_dict(self) -> dict[str, Any]:
        """Return what `guardrail backtest --json` prints of it."""
        return {
            "row": self.row,
            "step": self.step,
            "onset_row": self.onset_row,
            "onset_step": self.onset_step,
            "kind": self.kind,
            "signal": self.signal,
            "verdict": self.verdict,
            "score": self.score,
            "threshold": self.threshold,
        }

    @property
    def severity(self) -> int:
        """Return the rank of the verdict: a larger number is more severe."""
        if self.verdict == NOTE:
            return -1
        return ACTS.index(Action(self.verdict))


@dataclass(slots=True)
class BacktestIncident:
    """The alarms of one incident.

    Numbers are counted up to the first rollback or halt. A log does not show how the run would have
    continued after it.

    Attributes:
        first, last: its alarms.
        worst: the most severe alarm.
        rows: rows with an alarm.
        skips: updates that would have been skipped.
        rollbacks: 1 if it would have come to a rollback or a halt, else 0.
        steps_discarded: recorded steps that would have been skipped or repeated.
        acted: the first alarm that was more than a note; None if there is none.
        over: row at which it was over; None if the log ends before.
    """

    first: Alarm
    last: Alarm
    worst: Alarm
    rows: int = 0
    skips: int = 0
    rollbacks: int = 0
    steps_discarded: int = 0
    acted: Alarm | None = None
    over: int | None = None

    def add_alarm(self, alarm: Alarm) -> None:
        self.rows += 1
        self.last = alarm
        if alarm.severity > self.worst.severity:
            self.worst = alarm
        if alarm.verdict != NOTE and self.acted is None:
            self.acted = alarm
        if self.rollbacks:
            return
        if alarm.verdict == Action.SKIP:
            self.skips += 1
            self.steps_discarded += 1
        elif alarm.verdict == Action.RETRY:
            self.steps_discarded += 1
        elif alarm.verdict in GOES_BACK:
            self.rollbacks = 1
            target = alarm.before_step
            if target is None:
                target = alarm.onset_step
            self.steps_discarded += max(1, alarm.step - target + 1)


@dataclass
class BacktestResult:
    """What the controller decided about one log.

    Attributes:
        steps: of every record, in file order; `Alarm.row` is an index into it.
        names: signal -> its column.
        incidents: oldest first.
        notes: alarms that are notes outside of an incident.
        messages: one sentence each about rows or lines that are missing.
        further: further signals that the log records and that are not judged -> their columns.
        other_rows: kind of row -> number of rows that are no training records.
        loss: the kind of number that the loss was taken for; None if nothing shows it.
        policy_column: the column that showed that the loss is signed.
        seconds: time of the controller, without reading the log.
        differing: of a run directory with its own settings: rows whose live verdict was another;
            None otherwise.
    """

    path: str
    format: str
    steps: array[int]
    names: dict[str, str]
    alarms: list[Alarm] = field(default_factory=list)
    incidents: list[BacktestIncident] = field(default_factory=list)
    notes: int = 0
    messages: list[str] = field(default_factory=list)
    further: dict[str, str] = field(default_factory=dict)
    other_rows: dict[str, int] = field(default_factory=dict)
    loss: LossKind | None = None
    policy_column: str = ""
    seconds: float = 0.0
    differing: list[int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `guardrail backtest --json` prints of it."""
        loss = None
        if self.loss is not None:
            loss = self.loss.value
        result: dict[str, Any] = {
            "path": self.path,
            "records": len(self.steps),
            "steps": self.steps.tolist(),
            "alarms": [alarm.as_dict() for alarm in self.alarms],
            "seconds": round(self.seconds, 3),
            "format": self.format,
            "columns": self.names,
            "recorded_only": self.further,
            "rows_apart": self.other_rows,
            "loss": loss,
        }
        if self.differing is not None:
            result["differing_from_live"] = self.differing
        return result

    def count_saved_steps(self, incident: BacktestIncident) -> int:
        """Return how many recorded steps were unstable after the first action in this incident.

        This is the most that could have been saved. Whether the action would have worked, a log
        cannot show.
        """
        if incident.acted is None:
            return 0
        last = incident.last.row
        if incident.over is None:
            last = len(self.steps) - 1
        return max(0, self.steps[last] - incident.acted.step)
