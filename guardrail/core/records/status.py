"""The present state of a run, of its ranks and of its nodes."""

from __future__ import annotations

from enum import Enum

import msgspec

from guardrail.core.records.record import Record
from guardrail.core.records.verdicts import Mode


class SnapshotInfo(Record, frozen=True, kw_only=True):
    """A state that can be restored, in memory or on disk."""

    step: int
    cursor: int
    timeline: int
    tier: str  # "memory" or "disk"
    state: str  # "candidate", "good" or "suspect"
    time: float = 0.0
    bytes: int = 0
    path: str = ""


class Phase(str, Enum):
    """What a run or a rank is doing. Each phase has its own deadline for the heartbeat."""

    STARTING = "starting"
    SETUP = "setup"  # data, model, process group
    STEP = "step"
    EVAL = "eval"
    SAVE = "save"
    ROLLBACK = "rollback"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"  # by command or signal
    HALTED = "halted"  # by the guard
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (Phase.FINISHED, Phase.STOPPED, Phase.HALTED, Phase.FAILED)


class Unresolved(Record, frozen=True, kw_only=True):
    """An incident that is not over. Until it is, no state of the run counts as good.

    See `Status.unresolved`.

    Attributes:
        incident: its number.
        since: its first step (the estimated onset).
        is_open: it still goes on. False: it has ended, and the loss has stayed above its trend.
        acted: the guard has skipped or repeated a batch because of it, or restored a state.
        let_pass: why an update with findings was applied. "advise": the mode. "go on": the answer
            to the question. "new data": the guard accepted another kind of data. "": none was.
        loss: median of the newest applied steps, nats per token; None: there are none.
        expected: the loss that the trend before the onset predicts; None: too few steps were
            applied before it.
    """

    incident: int
    since: int
    is_open: bool = False
    acted: bool = False
    let_pass: str = ""
    loss: float | None = None
    expected: float | None = None

    @property
    def offset(self) -> float | None:
        """Return the loss minus its trend, nats per token; None: one of them is not known."""
        return None if self.loss is None or self.expected is None else self.loss - self.expected

    def headline(self) -> str:
        """Return the state in a few words: "LOSS +8.5 since 400", "UNSTABLE, no action (advise)".

        "" while the incident is open and the guard has acted on it.
        """
        if self.is_open:
            why = f" ({self.let_pass})" if self.let_pass else ""
            return "" if self.acted else f"UNSTABLE, no action{why}"
        if self.offset is None:
            return f"UNSTABLE since {self.since}"
        if self.offset < 0:
            return "LOSS NORMAL, not confirmed"
        return f"LOSS {self.offset:+.2g} since {self.since}"

    def sentence(self) -> str:
        """Return one line: "unresolved since step 400: loss 10.3, +8.5 above its trend, no action
        was taken (advise)".
        """
        parts = [f"unresolved since step {self.since}"]
        if self.offset is not None:
            above = f"{self.offset:+.2g} above its trend"
            back = "back at its trend, which the next steps have to confirm"
            parts.append(f"loss {self.loss:.3g}, {above if self.offset >= 0 else back}")
        if not self.acted:
            parts.append("no action was taken" + (f" ({self.let_pass})" if self.let_pass else ""))
        first, *more = parts
        return f"{first}: {', '.join(more)}" if more else first


class Status(Record, frozen=True, kw_only=True):
    """status.json: the present state of a run. `heartbeat`: wall time of its last replacement."""

    run: str
    phase: Phase
    step: int = 0
    total_steps: int = 0
    cursor: int = 0
    timeline: int = 0
    heartbeat: float = 0.0
    started: float = 0.0
    progress: str = ""  # of a long set-up: "tokenizing 43 %"
    mode: Mode = Mode.AUTO
    disk: str = "ok"  # "ok" or "failing: WHY"
    commands_problem: str = ""  # why commands are not read now; "": they are read
    question: str = ""  # while the guard waits for an answer: the action that it proposes
    # seq of the question's journal line; 0: none is open, or the line is not on disk yet
    question_number: int = 0
    deadline: float = 0.0  # wall time at which the default answer is taken; 0: never
    default: str = ""  # that answer: "proposal", "continue" or "stop"
    tokens: int = 0  # label tokens of applied steps
    tokens_per_second: float = 0.0
    eta_seconds: float = 0.0
    lr_factor: float = 1.0
    # The earliest incident that is not over. It is open, or it has ended with a loss above its
    # trend that no user has accepted.
    unresolved: Unresolved | None = None
    guard_share: float = 0.0  # time of the guard as a share of step time, measured in the run
    restarts: int = 0
    # the start of the ranks that wrote this: equal on all ranks, different after each restart
    start: str = ""
    world: int = 0
    host: str = ""
    pid: int = 0
    supervisor_pid: int = 0
    snapshots: tuple[SnapshotInfo, ...] = ()
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    exit_code: int | None = None


class RankStatus(Record, frozen=True, kw_only=True):
    """The state of one rank, for the supervisor and the screen.

    Until version 0.2 each rank wrote its own file, ranks/rank-00000.json.

    Attributes:
        progress: a counter that grows as the main thread works. When a rank hangs, its heartbeat
            continues and its progress does not: they come from different threads.
        step_seconds: time that the rank worked in its last step, without waiting for other ranks.
        gpu_percent: share of time in which the GPU is busy; below 0: unknown.
    """

    rank: int
    pid: int
    host: str
    phase: Phase
    step: int = 0
    progress: int = 0
    progress_time: float = 0.0
    heartbeat: float = 0.0
    step_seconds: float = 0.0
    memory_bytes: int = 0
    gpu_percent: float = -1.0
    gpu_memory_bytes: int = 0
    incarnation: int = 0
    closed: bool = False  # this is its last report; its process may still run


class NodeStatus(Record, frozen=True, kw_only=True):
    """ranks/node-NAME.json: the last reports of a node's ranks; replaced every `seconds`."""

    node: str
    host: str = ""
    time: float = 0.0
    seconds: float = 1.0
    ranks: tuple[RankStatus, ...] = ()
