"""What a detector receives about a step, and what it reports."""

from __future__ import annotations

import re
from enum import Enum

from guardrail.core.late_imports import find_detector
from guardrail.core.records.record import Record


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
