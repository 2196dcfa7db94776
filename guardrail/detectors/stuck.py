"""The very same number again and again: a cached loss, a norm that is no longer computed, a frozen
batch.

Some logs repeat numbers by nature: printed with two digits, or logged every tenth step and filled
in between. So the run's own history gives the limit. `usual` is the share of values that equalled
the one before them. With it, `n` consecutive repeats happen by chance at `usual ** n`. Below
`CHANCE` they are no chance.

The finding is a note, once for a series of equal values and again each time its length has doubled.
Such numbers say nothing about the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.detectors.base import Detector, LogJumps, ReplaySign

# Probability of a series that still counts as chance. Once in a hundred thousand runs of a million
# steps each would be 1e-11. A few digits of a quiet signal repeat more than independent draws, and
# this leaves room for that.
CHANCE = 1e-12
# Repeats that are never reported, with any history: one value in 10 steps of accumulation,
# logged at each of them.
LEAST = 8
# Values outside the present series before a history has a meaning.
KNOWN = 32


class Stuck(Detector):
    """Notes that one signal repeats. Base of the detectors below.

    Attributes:
        signal: its name in `Observation.signals`.
    """

    kind = FindingKind.STUCK
    replay_sign = ReplaySign.SAME_VALUE
    signal: str
    title = "Stuck numbers"
    help = """\
The same number comes again and again: a cached loss, a norm that is no longer computed, a frozen
batch.

- The history of the run gives the usual share of repeats. **Limit:** a chance below 1e-12, and at
  least 8 repeats.
- It needs 32 values before it reports anything.
- It is noted once, and again each time the number of repeats has doubled.
- **Test:** `tests/unit/detectors/test_stuck.py`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._value = math.nan
        self._repeats = 0  # values after it that equalled it
        self._report_at = math.inf  # repeats at which the next note is due
        self._values = self._equal = 0  # of all series before the present one

    def observe(self, obs: Observation) -> list[Finding]:
        if obs.signals.get(self.signal) != self._value or not self._is_due():
            return []
        # The onset is the step itself: nothing points at the weights, so no state becomes suspect.
        return [
            self.make_finding(
                obs,
                Severity.NOTE,
                signal=self.signal,
                value=self._value,
                baseline=self._value,
                score=float(self._repeats + 1),
                threshold=self._report_at,
            )
        ]

    def _is_due(self) -> bool:
        """Return whether one more of the same number is reported."""
        return self._repeats + 1 >= self._report_at

    def safe_limits(self) -> dict[str, float] | None:
        return None if self._is_due() else {}

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(self.signal)
        if value is None or not -math.inf < value < math.inf:
            return
        if value == self._value:
            self._repeats += 1
            if self._repeats == 1:
                self._report_at = self._first_report()
            elif self._repeats >= self._report_at:
                self._report_at *= 2
            return
        if self._value == self._value:  # there was one before: NaN equals nothing
            self._values += 1 + self._repeats
            self._equal += self._repeats
        self._value, self._repeats = value, 0
        self._report_at = math.inf

    def _first_report(self) -> float:
        """Return the repeats from which on the present series is no chance."""
        if self._values < KNOWN:
            return math.inf
        # One repeat more than were seen: a run that never repeated may still do it once.
        usual = (self._equal + 1) / (self._values + 1)
        if usual >= 1.0:
            return math.inf
        return max(LEAST, math.ceil(math.log(CHANCE) / math.log(usual)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "value": None if math.isnan(self._value) else self._value,
            "repeats": self._repeats,
            "tell_at": None if math.isinf(self._report_at) else self._report_at,
            "values": self._values,
            "equal": self._equal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        value, report_at = state["value"], state["tell_at"]
        self._value = math.nan if value is None else float(value)
        self._repeats = int(state["repeats"])
        self._report_at = math.inf if report_at is None else report_at
        self._values, self._equal = int(state["values"]), int(state["equal"])

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        count = finding.score + 1
        return f"{finding.signal} has been exactly {finding.value:.6g} for {count:.0f} steps"


class StuckLoss(Stuck):
    """Notes a loss that repeats."""

    name = "stuck_loss"
    signal = LOSS
    signals = (LOSS,)
    needs_positive_loss = True


class StuckGradNorm(Stuck):
    """Notes a gradient norm that repeats."""

    name = "stuck_grad_norm"
    signal = GRAD_NORM
    signals = (GRAD_NORM,)
