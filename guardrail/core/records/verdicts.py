"""What the controller decides about a step, and what a replay finds out about its cause."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar

from guardrail.core.cause_evidence import CauseEvidence
from guardrail.core.records.findings import Finding
from guardrail.core.records.record import Record
from guardrail.core.renamed_keys import Renamed


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


class Mode(str, Enum):
    """Who decides about remedies. `guardrail ctl mode` changes it while the run goes on."""

    AUTO = "auto"
    ASK = "ask"
    ADVISE = "advise"  # report what `auto` would do; change nothing
    OFF = "off"  # no detection at all


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
