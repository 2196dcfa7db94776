"""A loss that may be 0 or negative: the policy loss of reinforcement learning, around 0 and of any
size.

Its ratios and its logarithm mean nothing, and a value of 0 is healthy. So while the loss of a run
is signed, the detectors of losses that are positive are not asked, and this one is:

    note     |x - median| exceeds `NOTED` times the 90th percentile of |x - median| over the last values
    reject   it exceeds `REJECTED` times that: no update of a working run gives such a number

Whether a loss is signed, `guard.loss` says. With "auto" it is signed if a signal of reinforcement
learning is recorded beside it, or if more than `MOST_NOT_POSITIVE` of the first `FIRST` losses were
0 or negative. From the first such loss until that is decided it is treated as signed. Later on
losses below 0 alone show it, since no cross-entropy is ever negative; and a loss that is signed by
its values alone counts as positive again when it has behaved like a cross-entropy for `KEEP` steps:
all above 0, and their spread well below their median.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from guardrail.core.records import LOSS, Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps

FIRST, MOST_NOT_POSITIVE = 20, 2
# Values in the spread; a value that repeats the one before it (logged again, or held for ten rows)
# is no new one, and a value of 0 is that of a batch without variance.
KEEP, LEAST = 50, 16
NOTED, REJECTED = 10.0, 1000.0
# Spread of a positive loss, as a share of its median, at most. That of a loss around 0 is greater
# than the median.
STEADY = 0.25


class LossKind(StrEnum):
    UNKNOWN = "unknown"  # every loss was positive so far
    DOUBTFUL = "doubtful"  # one was not
    POSITIVE = "positive"
    SIGNED = "signed"


class SignedLoss:
    """Watches the loss.

    Args:
        given: the setting `guard.loss`: "auto", "positive" or "signed".
    """

    signals = (LOSS,)
    kind: LossKind  # what is known of the loss
    signed: bool  # whether it is treated as signed

    def __init__(self, given: str) -> None:
        self._given = given
        self._named = given == "signed"  # it is signed whatever its values are
        named = {"signed": LossKind.SIGNED, "positive": LossKind.POSITIVE}
        self._become(named.get(given, LossKind.UNKNOWN))
        self.reset()

    def reset(self) -> None:
        """What has been decided stays: a new level or other data make it no other kind of
        number.
        """
        if self.kind is LossKind.DOUBTFUL:
            self._become(LossKind.UNKNOWN)
        # Of the first losses; later on those below 0 are counted.
        self._records = 0 if self.kind is LossKind.UNKNOWN else FIRST
        self._not_positive = 0
        self._positive = 0  # losses above 0 directly before the next one
        self._step = 0  # of the last loss that counted
        self._last = math.nan
        self._values: deque[float] = deque(maxlen=KEEP)

    def _become(self, kind: LossKind) -> None:
        self.kind = kind
        self.signed = kind in (LossKind.SIGNED, LossKind.DOUBTFUL)
        self._is_positive = kind is LossKind.POSITIVE

    def declare(self) -> None:
        """A signal is recorded beside it that only reinforcement learning has."""
        if self._given == "auto":
            self._become(LossKind.SIGNED)
            self._named = True

    def observe(self, obs: Observation) -> list[Finding]:
        if not self.signed:
            return []
        value = obs.signals.get(LOSS)
        if value is None or not math.isfinite(value) or len(self._values) < LEAST:
            return []
        middle, spread = self._scale()
        distance = abs(value - middle)
        if not spread or distance <= NOTED * spread:
            return []
        rejected = distance > REJECTED * spread
        return [
            Finding(
                signal=LOSS,
                step=obs.step,
                kind=FindingKind.LOSS_SPIKE,
                severity=Severity.REJECT if rejected else Severity.NOTE,
                value=value,
                baseline=middle,
                score=distance / spread,
                threshold=REJECTED if rejected else NOTED,
                onset=obs.step,
            )
        ]

    def _scale(self) -> tuple[float, float]:
        """(Median, 90th percentile of the distance from it)."""
        middle = statistics.median(self._values)
        distances = sorted(abs(value - middle) for value in self._values)
        return middle, distances[int(0.9 * (len(distances) - 1))]

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(LOSS)
        if value is None or (self._is_positive and value > 0.0) or not math.isfinite(value):
            return
        if self._is_positive and obs.step == self._step:
            return
        self._step = obs.step
        if self._given == "auto" and not self._named:
            self._decide(value)
        if value not in (0.0, self._last):
            self._values.append(value)
        self._last = value

    def reconsider(self, obs: Observation) -> None:
        """A loss that was taken for a positive one is not positive in this step."""
        if self.kind is LossKind.POSITIVE:
            self.accept(obs)

    def _decide(self, value: float) -> None:
        self._records += 1
        self._positive = self._positive + 1 if value > 0.0 else 0
        self._not_positive += value < 0.0 or (value == 0.0 and self._records <= FIRST)
        if self.kind is LossKind.SIGNED:
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
        middle, spread = self._scale() if len(self._values) == KEEP else (0.0, 0.0)
        return 0.0 < spread < STEADY * middle

    def first_suspect_step(self) -> None:
        return None

    def band(self) -> None:
        """No one-sided band: the loss may be far off on either side."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "records": self._records,
            "not_positive": self._not_positive,
            "positive": self._positive,
            "named": self._named,
            "step": self._step,
            "last": None if math.isnan(self._last) else self._last,
            "values": list(self._values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        if self._given == "auto":
            self._become(LossKind(state["kind"]))
            self._named = bool(state["named"])
        self._positive, self._step = int(state["positive"]), int(state["step"])
        self._records, self._not_positive = int(state["records"]), int(state["not_positive"])
        self._last = math.nan if state["last"] is None else float(state["last"])
        self._values.extend(map(float, state["values"]))
