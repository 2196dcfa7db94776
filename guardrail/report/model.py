"""The report of a run as typed records. `guardrail report --json` prints the same fields."""

from __future__ import annotations

import math

from guardrail.core.records.record import Record
from guardrail.report.incident import Incident, IncidentAction


class CommandRecord(Record, frozen=True, kw_only=True):
    """A command and its answer in the journal."""

    id: str
    command: str
    value: float
    who: str
    step: int
    time: float
    effect: str
    reason: str = ""

    @property
    def is_applied(self) -> bool:
        return self.effect == "applied"


class CheckpointLine(Record, frozen=True, kw_only=True):
    """A checkpoint and its last known state."""

    name: str
    step: int
    state: str
    bytes: int = 0
    reason: str = ""
    time: float = 0.0


class Restart(Record, frozen=True, kw_only=True):
    """The run was continued from `checkpoint`. `steps_lost` applied updates after it were repeated.

    Attributes:
        seconds: time of the repeated updates; NaN: not measured.
        after: how the run had ended: "stopped", "finished", ..., "failure" (a rank failed or hung),
            or "" without a final message.
    """

    step: int
    timeline: int
    time: float
    checkpoint: str
    steps_lost: int
    sentence: str
    differs: tuple[str, ...] = ()  # parts of the state that differ from the saved ones
    seconds: float = math.nan
    after: str = ""


class Fault(Record, frozen=True, kw_only=True):
    """A rank that failed or hung, or a disk that could not be written.

    Attributes:
        kind: "rank failed", "rank hung", "disk failing" or "checkpoint failed".
        count: consecutive faults with this message.
        rank, host, log: of the failed rank; -1 and "" if unknown.
        resolved_step: step at which the run continued, or the disk could be written again; None: it
            is not resolved.
        seconds: from the fault until the run continued; NaN: unknown.
    """

    kind: str
    step: int
    time: float
    message: str
    count: int = 1
    rank: int = -1
    host: str = ""
    log: str = ""
    resolved_step: int | None = None
    seconds: float = math.nan


class Report(Record, frozen=True, kw_only=True):
    """What happened in a run.

    Attributes:
        state: phase of the final message. Without one: "running", "lost" if no process is alive, or
            "new".
        reason: the final message.
        seconds: from the first event to the last heartbeat.
        applied, rejected: rows of the present timeline.
        unresolved: the incident that is not over, as a sentence; "" without one.
        samples_skipped: by this run, without those of `data.quarantine`; -1: the journal does not
            name the sample order.
        samples_read: positions of the sample order that the run has read; 0: unknown.
        seconds_lost: by incidents, faults and repeated steps; NaN: not measured.
        by_person: skips and rollbacks that a user asked for.
        troubles: messages about ranks and disk, and notes, in the order of the journal.
        faults: failed or hung ranks and disk problems.
        notes: messages of `note` lines.
        data_folder: folder that paths of documents are relative to; "" if there is none.
        question: the open question of the run; "" if there is none.
        tokens: label tokens of the applied updates; 0: the loop did not count them.
        custom_loop: started by a script with a loop of its own, not by `guardrail launch`.
    """

    run: str
    path: str
    state: str
    step: int
    total_steps: int
    timeline: int
    exit_code: int | None = None
    reason: str = ""
    started: float = 0.0
    seconds: float = 0.0
    host: str = ""
    world: int = 0
    mode: str = ""
    tokens: int = 0
    guard_share: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None
    applied: int = 0
    rejected: int = 0
    unresolved: str = ""
    samples_skipped: int = 0
    samples_read: int = 0
    seconds_lost: float = math.nan
    incidents: tuple[Incident, ...] = ()
    by_person: tuple[IncidentAction, ...] = ()
    commands: tuple[CommandRecord, ...] = ()
    checkpoints: tuple[CheckpointLine, ...] = ()
    restarts: tuple[Restart, ...] = ()
    troubles: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    data_folder: str = ""
    question: str = ""
    custom_loop: bool = False
