"""A loss that may be 0 or negative, such as a policy loss of reinforcement learning.

Its values are around 0 and of any size. Its ratios and its logarithm have no meaning, and a value
of 0 is healthy. While the loss is signed, this detector replaces those of positive losses:

note     |x - median| exceeds `NOTED` times the 90th percentile of |x - median| over the last values
reject   it exceeds `REJECTED` times that: no update of a working run gives such a number

`guard.loss` says whether a loss is signed. With "auto" it is signed in two cases: a signal of
reinforcement learning is recorded with it, or more than `MOST_NOT_POSITIVE` of the first `FIRST`
losses were 0 or negative. From the first such loss until that is decided it is treated as signed.
Later only losses below 0 show it, since no cross-entropy is ever negative. A loss that is signed
only because of its values can become positive again. It must behave like a cross-entropy for `KEEP`
steps: all values above 0, and their spread well below their median.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from guardrail.core.objective import find_policy_signal
from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.detectors.base import Detector, DetectorParts, LogJumps

FIRST, MOST_NOT_POSITIVE = 20, 2
# Values in the spread. A value equal to the one before it is not used: it was logged again, or held
# for ten rows. A value of 0 is not used either: its batch has no variance.
KEEP, LEAST = 50, 16
NOTED, REJECTED = 10.0, 1000.0
# Largest spread of a positive loss, as a share of its median. That of a loss around 0 is greater
# than the median.
STEADY = 0.25


class LossKind(StrEnum):
    """What is known of the kind of the loss."""

    UNKNOWN = "unknown"  # every loss was positive so far
    DOUBTFUL = "doubtful"  # one was not
    POSITIVE = "positive"
    SIGNED = "signed"


class SignedLoss(Detector):
    """Judges a signed loss, and decides whether the loss is one.

    Attributes:
        loss_kind: what is known of the loss.
        is_signed: whether it is treated as signed.

    Args:
        given: the setting `guard.loss`: "auto", "positive" or "signed".
    """

    name = "signed_loss"
    kind = FindingKind.LOSS_SPIKE
    signals = (LOSS,)
    severities = (Severity.NOTE, Severity.REJECT)
    keys = ("loss",)
    judges_one_value = True
    title = "Signed loss"
    help = """\
A policy loss of reinforcement learning can be 0 or negative. Its ratios and logarithm mean
nothing. While the loss is signed, this detector replaces `loss`, `together`, `divergence` and
`stuck_loss`.

- The spread is the 90th percentile of the distance from the median, over the last 50 values (at
  least 16).
- **Note:** a distance of more than 10 spreads. **Reject:** more than 1000 spreads.
- With `guard.loss = "auto"` the loss is signed in two cases. A reward, an advantage, a KL
  divergence or a probability ratio is among the signals. Or more than 2 of the first 20 losses
  are 0 or negative.
- Later, losses below 0 also show it.
- A loss that is signed only by its values becomes positive again after 50 steps. All must be
  above 0, and their spread must be below a quarter of their median.
- Reward, KL, entropy, lengths and router losses are recorded and not judged.
  `guard.extra_signals` notes spikes in one of them.
- **Test:** `tests/unit/backtest/test_rl_logs.py`."""

    loss_kind: LossKind
    is_signed: bool

    def __init__(self, given: str) -> None:
        self._given = given
        self._is_declared = given == "signed"  # it is signed whatever its values are
        named = {"signed": LossKind.SIGNED, "positive": LossKind.POSITIVE}
        self._become(named.get(given, LossKind.UNKNOWN))
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> SignedLoss:
        options = parts.options
        if options.loss == "auto" and find_policy_signal(options.extra_signals) is not None:
            return cls("signed")
        return cls(options.loss)

    def reset(self) -> None:
        """Forget the values. What has been decided stays: new data make no other kind of number."""
        if self.loss_kind is LossKind.DOUBTFUL:
            self._become(LossKind.UNKNOWN)
        # Count the first losses; later only those below 0 count.
        self._records = 0 if self.loss_kind is LossKind.UNKNOWN else FIRST
        self._not_positive = 0
        self._positive = 0  # losses above 0 directly before the next one
        self._step = 0  # of the last loss that counted
        self._last = math.nan
        self._values: deque[float] = deque(maxlen=KEEP)

    def _become(self, kind: LossKind) -> None:
        self.loss_kind = kind
        self.is_signed = kind in (LossKind.SIGNED, LossKind.DOUBTFUL)
        self._is_positive = kind is LossKind.POSITIVE

    def declare(self) -> None:
        """Take the loss as signed: a signal is recorded that only reinforcement learning has."""
        if self._given == "auto":
            self._become(LossKind.SIGNED)
            self._is_declared = True

    # -- judging -----------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> list[Finding]:
        if not self.is_signed:
            return []
        value = obs.signals.get(LOSS)
        if value is None or not math.isfinite(value) or len(self._values) < LEAST:
            return []
        middle, spread = self._spread()
        distance = abs(value - middle)
        if not spread or distance <= NOTED * spread:
            return []
        severity, limit = Severity.NOTE, NOTED
        if distance > REJECTED * spread:
            severity, limit = Severity.REJECT, REJECTED
        return [
            self.make_finding(
                obs,
                severity,
                signal=LOSS,
                value=value,
                baseline=middle,
                score=distance / spread,
                threshold=limit,
            )
        ]

    def _spread(self) -> tuple[float, float]:
        """Return (median, 90th percentile of the distance from it)."""
        middle = statistics.median(self._values)
        distances = sorted(abs(value - middle) for value in self._values)
        return middle, distances[int(0.9 * (len(distances) - 1))]

    def safe_limits(self) -> dict[str, float] | None:
        # A loss that is too low is found as well.
        return None if self.is_signed else {}

    # -- learning ----------------------------------------------------------------------------------

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(LOSS)
        if value is None or (self._is_positive and value > 0.0) or not math.isfinite(value):
            return
        if self._is_positive and obs.step == self._step:
            return
        self._step = obs.step
        if self._given == "auto" and not self._is_declared:
            self._decide(value)
        if value not in (0.0, self._last):
            self._values.append(value)
        self._last = value

    def learn_unexpected(self, obs: Observation) -> None:
        """Learn from a step whose loss is not positive, though it was taken for a positive one."""
        if self.loss_kind is LossKind.POSITIVE:
            self.update(obs)

    def _decide(self, value: float) -> None:
        self._records += 1
        if value > 0.0:
            self._positive += 1
        else:
            self._positive = 0
        is_first = self._records <= FIRST
        self._not_positive += value < 0.0 or (value == 0.0 and is_first)
        if self.loss_kind is LossKind.SIGNED:
            if self._positive > KEEP and self._is_steady():
                self._become(LossKind.POSITIVE)
                self._not_positive = 0
        elif self._not_positive > MOST_NOT_POSITIVE:
            self._become(LossKind.SIGNED)
        elif self._records >= FIRST:
            self._become(LossKind.POSITIVE)
        elif self._not_positive:
            self._become(LossKind.DOUBTFUL)

    def _is_steady(self) -> bool:
        if len(self._values) < KEEP:
            return False
        middle, spread = self._spread()
        return 0.0 < spread < STEADY * middle

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.loss_kind.value,
            "records": self._records,
            "not_positive": self._not_positive,
            "positive": self._positive,
            "named": self._is_declared,
            "step": self._step,
            "last": None if math.isnan(self._last) else self._last,
            "values": list(self._values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        if self._given == "auto":
            self._become(LossKind(state["kind"]))
            self._is_declared = bool(state["named"])
        last = state["last"]
        self._positive, self._step = int(state["positive"]), int(state["step"])
        self._records, self._not_positive = int(state["records"]), int(state["not_positive"])
        self._last = math.nan if last is None else float(last)
        self._values.extend(map(float, state["values"]))
