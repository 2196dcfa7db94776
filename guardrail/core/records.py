"""The typed records that cross a boundary: controller to guard, guard to run directory, run
directory to screen.

Plain immutable data. No I/O, no clock, no torch: the pure core, the backtest and the screen share
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

AUTOMATIC = ("rejected", "rollback")  # origins of spans that the guard decided by itself
MAX_NAMED = 16  # documents or parameters named in one journal line; the rest is counted


class Action(str, Enum):
    """The controller's answer to a step, mildest first."""

    APPLY = "apply"
    SKIP = "skip"  # leave this update out and quarantine its samples
    ROLLBACK = "rollback"  # go back before the onset and quarantine the window
    PAUSE = "pause"  # park and ask
    HALT = "halt"  # checkpoint and exit with code 3
    # fp16: skip this update, halve the loss scale, continue with the next batch
    FP16_OVERFLOW = "overflow"
    # the numbers did not come again: leave this update out and form the same batch once more
    RETRY = "retry"


class Cause(str, Enum):
    """What a replay of an incident's first step has shown to be behind it."""

    DATA = "data"  # this batch does it from an older state too, and other batches do not
    STATE = "state"  # any batch does it from this state
    DATA_AND_STATE = "data, only from this state"  # this batch spikes, but only from this state
    HARDWARE = "not reproducible"  # the same batch from the same state gives other numbers
    UNKNOWN = "unknown"  # nothing to compare with: no older state, no other batch

    @classmethod
    def _missing_(cls, value: object) -> Cause | None:
        """Accept the words of older versions."""
        new = OLD_CAUSES.get(str(value))
        return None if new is None else cls(new)

    @property
    def of_data(self) -> bool:
        """Whether the batch is to blame, alone or with this state."""
        return self in (Cause.DATA, Cause.DATA_AND_STATE)


# Causes in older versions -> present words.
OLD_CAUSES = {
    "data x state": "data, only from this state",
    "hardware or nondeterminism": "not reproducible",
}


class Severity(str, Enum):
    """What a finding calls for."""

    NOTE = "note"  # a line in the journal; the update is applied
    REJECT = "reject"  # this update must not be applied
    WEIGHTS_DAMAGED = "persistent"  # damage is in the weights already: roll back
    PERSISTENT = "persistent"  # old name of WEIGHTS_DAMAGED


_KIND_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")


class FindingKind(str, Enum):
    """What a finding claims.

    Any other name of lower-case letters, digits and underscores is a kind too, such as
    `FindingKind("token_drift")`: of a detector that was added, or of another version.
    """

    NONFINITE = "nonfinite"  # NaN or Inf in a loss or a gradient
    LOSS_SPIKE = "loss_spike"
    GRAD_SPIKE = "grad_spike"
    EMBED_SPIKE = "embed_spike"
    UPDATE_SPIKE = "update_spike"  # the optimizer's step grew; the update is in the weights already
    SPIKE = "spike"  # of a signal that the loop, or who reads a log, has named
    GROWTH = "growth"  # a norm climbs step by step, none of which is a spike
    DIVERGENCE = "divergence"  # the loss rose and stays up
    LEVEL_SHIFT = "level_shift"  # a signal stepped up and stays there, without growing further
    NO_TOKENS = "no_tokens"  # every label of the batch is ignored: nothing to learn from
    IMPOSSIBLE = "impossible"  # finite, but no working model gives it: a loss of exactly 0, 1e30
    STUCK = "stuck"  # the very same number again and again
    # overflow after overflow: the gradients are to blame, not the loss scale
    SCALE_COLLAPSE = "scale_collapse"
    RESUME_JUMP = "resume_jump"  # the run does not go on where it was before a resume
    RESTART = "restart"  # the step counter went back: another run, or a resume in a recorded log

    @classmethod
    def _missing_(cls, value: object) -> FindingKind | None:
        """Make the kind of a name that does not stand above; None: it is not a name."""
        if not isinstance(value, str) or not _KIND_NAME.fullmatch(value):
            return None
        kind = str.__new__(cls, value)
        kind._name_, kind._value_ = value.upper(), value
        return kind


class Mode(str, Enum):
    """Who decides about remedies. Changed live by the `policy` command."""

    AUTO = "auto"
    ASK = "ask"
    ADVISE = "advise"  # says what it would do and changes nothing
    OFF = "off"  # no detection at all


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Base of the records: immutable, keyword-only, tolerant of fields of a newer version."""


class Observation(Record, frozen=True, kw_only=True):
    """What every rank knows about one step after the one all-reduce; equal on all ranks.

    Attributes:
        step: the number this update would get, counting from 1.
        first, last: positions [first, last) of the sample order that the batch covers.
        signals: name -> value; NaN and Inf are allowed and meaningful.
        nonfinite_loss, nonfinite_grad: ranks that saw a NaN or Inf themselves.
        tokens: label tokens in the global batch that are not ignored.
        streak: batches rejected directly before this one, with no applied update between.
        overflow: the gradients, not the loss, are non-finite under a loss scale: too high a scale
        explains it.
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
    """A detector's claim. `onset` is the step at which the trouble is estimated to have begun."""

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

        The detector of its kind has the wording.
        """
        return str(find_detector(self.kind).sentence(self))


def score_words(score: float, limit: float) -> str:
    """ "score 41.2 (limit 8)"; a score just above its limit gets as many digits as show it, at most
    six.
    """
    digits = next(
        (n for n in range(3, 6) if score <= limit or f"{score:.{n}g}" != f"{limit:.{n}g}"), 6
    )
    return f"score {score:.{digits}g} (limit {limit:.3g})"


class Diagnosis(Record, frozen=True, kw_only=True):
    """The outcome of a replay; equal on all ranks, and a `diagnosis` line of the journal.

    Attributes:
        reason: one sentence with the numbers of the passes.
        rank, host: for HARDWARE, who computed something else the second time; -1 and "" otherwise.
        passes: forward and backward passes that it took.
        applied: for DATA, an update of what is to blame is in the weights: to leave out what comes
        is not enough.
        positions: for DATA, the few samples that explain the trouble from its onset on, ascending;
            () where they do not, or nobody looked.
        ahead: what lies ahead is in the same trouble, as far as was looked: no bad stretch, but
        what the data now is.
        structure: what it costs the model when the labels of the batch stand in another order, as a
            share of what that costs with usual batches; about 0 where labels are as good as drawn
            by lot. None: nobody looked.
        shift: so this is another kind of data, to be learnt as a new level.
        borne: no spike, just raised steps, and no batch is to blame: applied.
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
    """What a verdict does besides skipping data. A function of the step, so exact after a rollback.

    Attributes:
        kind: "lr" (factor on the scheduled rate), "embed_alpha" (factor on embedding gradients),
            "clip" (factor on the clipping norm) or "moments" (optimizer moments set to zero, once).
        value: the factor, in (0, 1]; unused for "moments".
        from_step: first step it holds for.
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
    """The loss before an incident: log loss = level + slope (log step - middle); see
    guardrail.decide.recovery.

    Attributes:
        noise: of a single log loss, robust sigma.
        spread: sum of (log step - middle)^2 over the `count` losses that were fitted.
    """

    middle: float
    level: float
    slope: float
    noise: float
    spread: float
    count: int


class RecoveryResult(Record, frozen=True, kw_only=True):
    """The loss behind an incident against what its curve had promised, nats a token.

    Attributes:
        offset: got - expected.
        noise: of a single loss.
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
        action: what happens (in `advise`: APPLY, with `would` saying what would have happened).
        findings: the evidence, most severe first.
        onset: first step of the trouble; rollback goes to a snapshot before it.
        window: for ROLLBACK, positions [first, last) to quarantine; else the batch's own span.
        positions: for ROLLBACK, the samples of the window that are to blame; (): all of it.
        before_step: for ROLLBACK, the first step whose batch is in the window: the state to go back
        to is older.
        reason: one sentence with numbers, for the journal.
        would: in `advise` and in PAUSE, the action that `auto` would have taken.
        beyond: the action that was decided before, and would leave out more than
        `guard.max_skipped_share` allows.
        accepted: the value enters the baselines (False for every rejected step).
        incident: number of the incident that this step belongs to, None while all is well.
        incident_state: "open" on the verdict that opens it, "repeated" on one that goes back for it
            once more, "recovered" or "recovered with higher loss" on the one that closes it, "recovered" on a
            later one that brings the loss back after that, else "".
        escalation: action of the `[[guard.escalation]]` step that this is.
        remedies: what goes with it.
        cause: of the incident, where a replay has told it.
        outcome: where the loss stands on the verdict that closes an incident.
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
    """What a command was shown to do when it was given. Where that has changed it is refused.

    Attributes:
        timeline: of the run; None: not shown.
        to_step, tier: the state that it goes back to; None, "": it goes nowhere.
        steps_lost: applied steps that it discards; `steps_lost_most`: as many may be, since
        training goes on meanwhile.
        instead_of: the factor, or index of the mode, that it replaces; None: not shown.
    """

    timeline: int | None = None
    to_step: int | None = None
    tier: str = ""
    steps_lost: int = 0
    steps_lost_most: int = 0
    instead_of: float | None = None


class Command(Record, frozen=True, kw_only=True):
    """One file of the inbox. Kind and value fit two float64 slots of the packed vector.

    Attributes:
        kind: name of the command; see `guardrail.decide.control_commands.registry`.
        at_step: delays the effect to the end of that step, for scripts and tests.
        question: journal line of the question that was open when the command was given, 0: none
            was; None: not said, then the one counts that is open when the command arrives.
        shown: what it was shown to do; None: nothing was.
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
        batches: how many it covers.
        positions: ascending; where given, only these of the range are skipped.
        allowed: a user was asked first, since it is more than the guard may skip by itself.
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
    """A stretch of one document: what a sample was cut from, for a person to look up.

    Attributes:
        path: file, or "builtin:..." for text that stands in no file of its own.
        record: line of a JSONL file, counting from 1; 0: the whole file is one document.
        first_byte, last_byte: the stretch [first_byte, last_byte) of the document's text in UTF-8,
            which is the (uncompressed) file itself where `record` is 0.
    """

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0

    def __str__(self) -> str:
        line = f":{self.record}" if self.record else ""
        return f"{self.path}{line} bytes {self.first_byte}-{self.last_byte}"


class SnapshotInfo(Record, frozen=True, kw_only=True):
    """A restorable state, on either tier, as the policy and the screen see it."""

    step: int
    cursor: int
    timeline: int
    tier: str  # "memory" or "disk"
    state: str  # "candidate", "good" or "suspect"
    time: float = 0.0
    bytes: int = 0
    path: str = ""


def field_of(record: Any, name: str) -> Any:
    """A field of a record, or of the dict that it became in the journal."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def origin_of_span(span: Any) -> Any:
    """The origin of a span, as a record or as the dict that it became in the journal."""
    return span.origin if isinstance(span, Span) else field_of(span, "cause")


class Phase(str, Enum):
    """Where a run or a rank is. Each phase has its own deadline for the heartbeat."""

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
    """An incident that is not over: no state of the run becomes good before it is. See
    `Status.unresolved`.

    Attributes:
        incident: its number.
        since: the first step of it (the estimated onset).
        is_open: it still goes on. False: it has ended, and the loss has stayed above its trend.
        acted: something was done about it: a batch was skipped, or a state restored.
        let_pass: why an update that was found bad was applied all the same: "advise", "go on" (the
            answer to the question), "new data" (the guard took it for another kind of data); ""
            where none was.
        loss: median of the newest applied steps, nats a token; None where there is none.
        expected: the loss that the trend before the onset leads to; None where too few steps were
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
        """Loss above its trend, nats a token; None where one of them is not known."""
        return None if self.loss is None or self.expected is None else self.loss - self.expected

    def headline(self) -> str:
        """The state in a few words: "LOSS +8.5 since 400", "UNSTABLE, no action (advise)".

        "" while the guard deals with it: the incident is open, and something was done.
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
        """One line: "unresolved since step 400: loss 10.3, +8.5 above its trend, no action was
        taken (advise)".
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
    """status.json: what a glance needs. `heartbeat` is the wall time of the last replacement."""

    run: str
    phase: Phase
    step: int = 0
    total_steps: int = 0
    cursor: int = 0
    timeline: int = 0
    heartbeat: float = 0.0
    started: float = 0.0
    progress: str = ""  # a long set-up says how far it is: "tokenizing 43 %"
    mode: Mode = Mode.AUTO
    disk: str = "ok"  # "ok" or "failing: WHY"
    commands_problem: str = ""  # why commands are not read at the moment, "" while they are
    question: str = ""  # while parked by the guard: what it proposes
    # seq of its journal line; 0: none is open, or the line is not on disk yet
    question_number: int = 0
    deadline: float = 0.0  # wall time at which the guard answers its question itself; 0: never
    default: str = ""  # what it then does: "proposal", "continue" or "stop"
    tokens: int = 0  # label tokens of applied steps
    tokens_per_second: float = 0.0
    eta_seconds: float = 0.0
    lr_factor: float = 1.0
    # The earliest incident that is not over: open, or ended with a loss above its trend that nobody
    # accepted.
    unresolved: Unresolved | None = None
    guard_share: float = 0.0  # the guard's own time as a share of the step, measured in the run
    restarts: int = 0
    # which start of the ranks wrote this: equal on all its ranks, another after each restart
    start: str = ""
    world: int = 0
    host: str = ""
    pid: int = 0
    supervisor_pid: int = 0
    snapshots: tuple[SnapshotInfo, ...] = ()
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    exit_code: int | None = None


class RankStatus(Record, frozen=True, kw_only=True):
    """What the supervisor and the screen need of one rank. (Until 0.2 each rank wrote its own
    ranks/rank-00000.json.)

    `progress` counts up whenever the main thread gets ahead; a hung rank's heartbeat goes on (its
    thread lives) while its progress does not. `step_seconds` is what the rank worked itself in its
    last step, without waiting for others; `gpu_percent` below 0 is unknown.
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
    closed: bool = False  # it will report no more, although its process may go on


class NodeStatus(Record, frozen=True, kw_only=True):
    """ranks/node-NAME.json: what the ranks of one node have reported; replaced every `seconds`."""

    node: str
    host: str = ""
    time: float = 0.0
    seconds: float = 1.0
    ranks: tuple[RankStatus, ...] = ()


# Columns of metrics.bin, all float64. One row for each step that was tried, rejected ones included.
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
    "eval_loss",  # NaN where no evaluation was made after this step
    LOSS_SCALE,  # NaN without fp16
)
