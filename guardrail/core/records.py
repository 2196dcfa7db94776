"""The typed records that rooms pass to each other: controller to guard, guard to run directory, run
directory to screen.

Plain immutable data without I/O, clock or torch. The controller, the backtest and the screen share
this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import msgspec

from guardrail.core.cause_evidence import CauseEvidence
from guardrail.core.late_imports import find_detector
from guardrail.core.renamed_keys import Renamed

LOSS = "loss"  # nats a token, mean over the global batch
GRAD_NORM = "grad_norm"  # L2 norm of all gradients before clipping
EMBED_GRAD_NORM = "embed_grad_norm"  # L2 norm of the embedding gradients before clipping
EMBED_SHARE = "embed_share"  # embed_grad_norm^2 / grad_norm^2, in [0, 1]
UPDATE_NORM = "update_norm"  # L2 norm of the optimizer's last update, where it is measured
LOSS_SCALE = "loss_scale"  # what fp16 multiplies the loss by before the backward pass

AUTOMATIC = ("rejected", "rollback")  # origins of the spans that the guard skipped automatically
MAX_NAMED = 16  # documents or parameters named in one journal line; the rest is counted


class Action(str, Enum):
    """The controller's answer to a step, mildest first."""

    APPLY = "apply"
    SKIP = "skip"  # do not apply this update; quarantine its samples
    ROLLBACK = "rollback"  # restore a state from before the onset; quarantine the window
    PAUSE = "pause"  # wait for a user's answer
    HALT = "halt"  # write a checkpoint and exit with code 3
    # fp16: skip this update, halve the loss scale, continue with the next batch
    FP16_OVERFLOW = "overflow"
    # the numbers were not reproduced: skip this update and repeat the batch
    RETRY = "retry"


class Cause(str, Enum):
    """The cause of an incident, found by a replay of its first step."""

    DATA = "data"  # the batch spikes from an older state too; other batches do not
    STATE = "state"  # any batch spikes from this state
    DATA_AND_STATE = "data, only from this state"  # the batch spikes, but only from this state
    HARDWARE = "not reproducible"  # batch and state are the same, the numbers are not
    UNKNOWN = "unknown"  # nothing to compare with: no older state, no other batch

    @classmethod
    def _missing_(cls, value: object) -> Cause | None:
        """Accept the words of older versions."""
        new = OLD_CAUSES.get(str(value))
        return None if new is None else cls(new)

    @property
    def of_data(self) -> bool:
        """Return whether the batch is the cause, alone or together with this state."""
        return self in (Cause.DATA, Cause.DATA_AND_STATE)


# Causes in older versions -> present words.
OLD_CAUSES = {
    "data x state": "data, only from this state",
    "hardware or nondeterminism": "not reproducible",
}


class Severity(str, Enum):
    """What has to be done about a finding."""

    NOTE = "note"  # journal it and apply the update
    REJECT = "reject"  # this update must not be applied
    WEIGHTS_DAMAGED = "persistent"  # the damage is in the weights already: roll back
    PERSISTENT = "persistent"  # old name of WEIGHTS_DAMAGED


_KIND_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


class FindingKind(str, Enum):
    """What a finding claims.

    Other names of lower-case letters, digits and underscores are kinds too. Example:
    `FindingKind("token_drift")`. Added detectors and other versions may use them.
    """

    NONFINITE = "nonfinite"  # NaN or Inf in a loss or a gradient
    LOSS_SPIKE = "loss_spike"
    GRAD_SPIKE = "grad_spike"
    EMBED_SPIKE = "embed_spike"
    UPDATE_SPIKE = "update_spike"  # the update grew; it is in the weights already
    SPIKE = "spike"  # of a signal that the loop or the reader of a log has named
    GROWTH = "growth"  # a norm rises over many steps; none of them is a spike
    DIVERGENCE = "divergence"  # the loss rose and stays high
    LEVEL_SHIFT = "level_shift"  # a signal rose once and stays at the new level
    NO_TOKENS = "no_tokens"  # every label of the batch is ignored
    IMPOSSIBLE = "impossible"  # finite, but no working model gives it: a loss of 0 or 1e30
    STUCK = "stuck"  # the same number in many steps
    # many consecutive overflows: the gradients are the cause, not the loss scale
    SCALE_COLLAPSE = "scale_collapse"
    RESUME_JUMP = "resume_jump"  # after a resume, the numbers differ from those before it
    RESTART = "restart"  # the step counter decreased: another run, or a resume in a recorded log

    @classmethod
    def _missing_(cls, value: object) -> FindingKind | None:
        """Return the kind of a name that is not listed above; None: the value is not a name."""
        if not isinstance(value, str) or not _KIND_NAME.fullmatch(value):
            return None
        kind = str.__new__(cls, value)
        kind._name_, kind._value_ = value.upper(), value
        return kind


class Mode(str, Enum):
    """Who decides about remedies. `guardrail ctl mode` changes it while the run goes on."""

    AUTO = "auto"
    ASK = "ask"
    ADVISE = "advise"  # report what `auto` would do; change nothing
    OFF = "off"  # no detection at all


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Base of the records: immutable and keyword-only. Ignores the fields of newer versions."""


class Observation(Record, frozen=True, kw_only=True):
    """The numbers of one step after its all-reduce; equal on all ranks.

    Attributes:
        step: number of this update if it is applied, counted from 1.
        first, last: positions [first, last) of the sample order that the batch covers.
        signals: name -> value. NaN and Inf are allowed.
        nonfinite_loss, nonfinite_grad: ranks that computed NaN or Inf before the reduction.
        tokens: label tokens in the global batch that are not ignored.
        streak: consecutive batches rejected directly before this one.
        overflow: under a loss scale, the gradients are not finite and the loss is. A scale that is
            too high explains this.
    """

    step: int
    first: int
    last: int
    signals: dict[str, float]
    nonfinite_loss: tuple[int, ...] = ()
    nonfinite_grad: tuple[int, ...] = ()
    tokens: int = 1
    streak: int = 0
    overflow: bool = False


class Finding(Record, frozen=True, kw_only=True):
    """What a detector reports about a step. `onset`: the estimated first step of the anomaly."""

    signal: str
    step: int
    kind: FindingKind
    severity: Severity
    value: float
    baseline: float
    score: float
    threshold: float
    onset: int
    ranks: tuple[int, ...] = ()

    def sentence(self) -> str:
        """Return one line: "loss 11.5 (normal 2.31), score 41.2 (limit 8)".

        The detector of this kind formats it.
        """
        return str(find_detector(self.kind).sentence(self))


def score_words(score: float, limit: float) -> str:
    """Return "score 41.2 (limit 8)".

    A score just above its limit gets as many digits as show the difference, at most six.
    """
    digits = next(
        (n for n in range(3, 6) if score <= limit or f"{score:.{n}g}" != f"{limit:.{n}g}"), 6
    )
    return f"score {score:.{digits}g} (limit {limit:.3g})"


class Diagnosis(Record, frozen=True, kw_only=True):
    """The outcome of a replay; equal on all ranks, and a `diagnosis` line of the journal.

    Attributes:
        reason: one sentence with the numbers of the passes.
        rank, host: for HARDWARE, the rank whose second result differed; otherwise -1 and "".
        passes: forward and backward passes of the test.
        applied: for DATA, an update of the bad data is in the weights. Skipping later batches is
            not enough.
        positions: for DATA, the few samples that explain the anomaly since its onset, ascending;
            (): they do not explain it, or this was not tested.
        ahead: all later batches that were tested have the anomaly too. So it is not a bad range:
            the data has changed.
        structure: loss increase when the labels of the batch are shuffled, as a share of the same
            increase on usual batches. About 0 for random labels. None: not tested.
        shift: this is another kind of data, to be accepted as a new level.
        borne: the update is tolerated and applied. The steps are raised but no spike, and no batch
            is the cause.
        evidence: the numbers of `reason` under names; None in journals of older versions.
    """

    cause: Cause
    reason: str = ""
    rank: int = -1
    host: str = ""
    passes: int = 0
    applied: bool = False
    positions: tuple[int, ...] = ()
    ahead: bool = False
    structure: float | None = None
    shift: bool = False
    borne: bool = False
    evidence: CauseEvidence | None = None


class Remedy(Renamed, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What a verdict does besides skipping data.

    It depends on the step alone, so it is exact after a rollback.

    Attributes:
        kind: "lr" (factor on the scheduled rate), "embed_alpha" (factor on embedding gradients),
            "clip" (factor on the clipping norm) or "moments" (sets the optimizer's moments to 0).
        value: the factor, in (0, 1]; unused for "moments".
        from_step: first step with the effect.
        hold_steps: steps at the full effect.
        ramp_steps: steps over which the factor then returns to 1, linearly.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"hold": "hold_steps", "back": "ramp_steps"}

    kind: str
    value: float
    from_step: int
    hold_steps: int = 0
    ramp_steps: int = 0


class LossTrend(Record, frozen=True, kw_only=True):
    """The trend of the loss before an incident.

    log loss = level + slope (log step - middle); see guardrail.decide.recovery.

    Attributes:
        noise: robust sigma of a single log loss.
        spread: sum of (log step - middle)^2 over the `count` losses that were fitted.
    """

    middle: float
    level: float
    slope: float
    noise: float
    spread: float
    count: int


class RecoveryResult(Record, frozen=True, kw_only=True):
    """The loss after an incident and the loss that the trend predicts, nats per token.

    Attributes:
        expected, got: predicted and measured loss.
        noise: of a single loss.
        offset: got - expected.
        lasting: the offset is more than noise.
    """

    expected: float
    got: float
    noise: float
    offset: float
    lasting: bool = False


class Verdict(Record, frozen=True, kw_only=True):
    """The controller's answer to one observation.

    Attributes:
        action: what is done. In `advise` this is APPLY, and `would` holds the action of `auto`.
        findings: the evidence, most severe first.
        onset: first step of the anomaly. A rollback restores a snapshot from before it.
        window: for ROLLBACK, positions [first, last) to quarantine; else the batch's own span.
        positions: for ROLLBACK, the samples of the window that are the cause; (): all samples.
        before_step: for ROLLBACK, the first step whose batch is in the window. The state to restore
            is older.
        reason: one sentence with numbers, for the journal.
        would: in `advise` and in PAUSE, the action that `auto` would have taken.
        beyond: an action that was decided, but skips more than `guard.max_skipped_share` allows.
        accepted: the value enters the baselines (False for every rejected step).
        incident: number of the incident that this step belongs to; None: no incident.
        incident_state: "open" on the verdict that opens it. "repeated" on one that rolls back for
            it again. "recovered" or "recovered with higher loss" on the one that closes it.
            "recovered" also on a later verdict, when the higher loss has come down. Else "".
        escalation: action of the `[[guard.escalation]]` step that decided.
        remedies: that come with the action.
        cause: of the incident, if a replay has found it.
        outcome: of the loss, on the verdict that closes an incident.
    """

    action: Action
    step: int
    findings: tuple[Finding, ...] = ()
    onset: int | None = None
    window: tuple[int, int] | None = None
    positions: tuple[int, ...] = ()
    before_step: int | None = None
    reason: str = ""
    would: Action | None = None
    beyond: Action | None = None
    accepted: bool = True
    incident: int | None = None
    incident_state: str = ""
    escalation: str = ""
    remedies: tuple[Remedy, ...] = ()
    cause: Cause | None = None
    outcome: RecoveryResult | None = None


class Shown(Record, frozen=True, kw_only=True):
    """The preview of a command when it was given. The command is refused if that has changed.

    Attributes:
        timeline: of the run; None: not shown.
        to_step, tier: the state that it restores; None, "": it restores none.
        steps_lost: applied steps that it discards.
        steps_lost_most: limit of `steps_lost`, since training goes on until the command arrives.
        instead_of: the factor, or index of the mode, that it replaces; None: not shown.
    """

    timeline: int | None = None
    to_step: int | None = None
    tier: str = ""
    steps_lost: int = 0
    steps_lost_most: int = 0
    instead_of: float | None = None


class Command(Record, frozen=True, kw_only=True):
    """One command of a user: a file in commands/.

    Kind and value fit into two float64 elements of the all-reduced vector.

    Attributes:
        kind: name of the command; see `guardrail.decide.control_commands.registry`.
        at_step: the command takes effect at the end of this step, for scripts and tests.
        question: journal line of the question that was open when the command was given; 0: none.
            None: the question that is open when the command arrives.
        shown: its preview; None: there was none.
    """

    id: str
    kind: str
    value: float = 0.0
    who: str = ""
    time: float = 0.0
    at_step: int = 0
    question: int | None = None
    shown: Shown | None = None


class Span(Record, frozen=True, kw_only=True, rename={"origin": "cause"}):
    """A range [first, last) of positions of the sample order that the run skips, and why.

    On disk and in JSON `origin` is called "cause".

    Attributes:
        origin: "rejected" (one skipped update), "rollback", "user" or "file".
        step: at which it was decided.
        batches: number of batches that it covers.
        positions: ascending. If there are any, only these samples of the range are skipped.
        allowed: a user agreed to it. It is more than the guard may skip without asking.
    """

    first: int
    last: int
    origin: str
    step: int
    reason: str = ""
    batches: int = 1
    positions: tuple[int, ...] = ()
    allowed: bool = False


class DocumentRef(Record, frozen=True, kw_only=True):
    """The part of a document that a sample consists of, so that a user can look it up.

    Attributes:
        path: file, or "builtin:..." for text that is in no file.
        record: line of a JSONL file, counted from 1; 0: the file is one document.
        first_byte, last_byte: range [first_byte, last_byte) of the document's text in UTF-8. Where
            `record` is 0, that text is the uncompressed file.
    """

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0

    def __str__(self) -> str:
        line = f":{self.record}" if self.record else ""
        return f"{self.path}{line} bytes {self.first_byte}-{self.last_byte}"


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


def field_of(record: Any, name: str) -> Any:
    """Return a field of a record, or of a dict that was read from the journal."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def origin_of_span(span: Any) -> Any:
    """Return the origin of a span: a record, or a dict that was read from the journal."""
    return span.origin if isinstance(span, Span) else field_of(span, "cause")


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


# Columns of metrics.bin, all float64. One row per attempted step; rejected steps have one too.
METRIC_COLUMNS = (
    "step",
    "timeline",
    "time",
    "first",
    "last",
    LOSS,
    GRAD_NORM,
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    "lr",
    "tokens",
    "step_time",
    "step_time_max",
    "slowest_rank",
    "guard_time",
    "verdict",  # index into list(Action); in `advise` always 0
    "loss_baseline",
    "loss_threshold",
    "grad_norm_baseline",
    "grad_norm_threshold",
    "embed_grad_norm_baseline",
    "embed_grad_norm_threshold",
    "eval_loss",  # NaN: no evaluation after this step
    LOSS_SCALE,  # NaN without fp16
)
