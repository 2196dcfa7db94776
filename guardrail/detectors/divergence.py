"""The loss rose and stays high: slow divergence, or a step to a worse level that no single value
shows.

The level of the loss is the median of the logarithms of the last `steps` accepted steps. It is
compared with the lowest level of the last `history` accepted steps, which a rise cannot lift: that
reference is from before the rise. A rejected value never enters a level, so this is damage that is
in the weights already. A smaller rise that neither grows nor goes away is noted as a level shift.

The onset is the point that best separates the last values into "before" and "after". It is the k
that maximises the sum over i >= k of y[i] - middle. The middle lies between reference and present
level. This is the maximum-likelihood change point of a step in normal noise (Hinkley 1970).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.core.section import Positive, PositiveFloat
from guardrail.detectors.base import Detector, DetectorParts, DetectorSettings, LogJumps
from guardrail.detectors.baseline import Baseline, SortedWindow
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import LossSpike


class DivergenceSettings(DetectorSettings, frozen=True, kw_only=True):
    """[guard.detectors.divergence]: a loss that rose and stays up."""

    table: ClassVar[str] = "divergence"

    # Robust standard deviations by which the level of the loss may rise above the lowest level of the
    # history. Above it, the run is rolled back.
    threshold: PositiveFloat = 6.0
    # Accepted steps whose median log loss is the level. A sudden rise is found after half of them.
    steps: Positive = 20


class Divergence(Detector):
    """Judges the level of the loss.

    Args:
        baseline: of the loss spikes, which learns it; its scale is the noise of a single value.
        settings: the threshold, and the accepted steps in the level.
        history: accepted steps within which the reference level lies.
    """

    name = "divergence"
    kind = FindingKind.DIVERGENCE
    signals = (LOSS,)
    severities = (Severity.NOTE, Severity.WEIGHTS_DAMAGED)
    Settings = DivergenceSettings
    keys = (
        "detectors.divergence.threshold",
        "detectors.divergence.steps",
        "detectors.spike.history",
    )
    damage_is_in_weights = True
    needs_positive_loss = True
    title = "Divergence"
    help = """\
The loss rose and stays up. No single value shows it.

- The level is the median of the logarithms of the last `steps` accepted steps.
- It is compared with the lowest level of the last `history` accepted steps.
- **Limit:** `threshold` robust standard deviations. The finding is `persistent` and causes
  a rollback.
- A sudden rise is found after half of `steps`.
- From half of the limit on, new states are suspect: they are not called good.
- A level that stands at 0.65 of the limit for `steps` steps is noted as a level shift.
- The onset is the point that best separates "before" and "after".
- **Source:** maximum-likelihood change point, Hinkley 1970.
- **Test:** `tests/unit/detectors/test_divergence.py`."""

    # Share of the threshold at which a level that has stood for `steps` steps is noted. States
    # become suspect at half of it. This is far enough above that: drifting smoothed losses do not
    # reach it.
    SHIFT = 0.65
    # Accepted steps kept for the onset, in multiples of `steps`: a slow rise began before the level
    # showed it.
    MEMORY = 3

    def __init__(self, baseline: Baseline, settings: DivergenceSettings, *, history: int) -> None:
        self.baseline = baseline
        self.threshold, self.steps = settings.threshold, settings.steps
        self.history = history
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> Divergence:
        history = parts.settings(SpikeSettings).history
        baseline = parts.get(LossSpike).baseline
        return cls(baseline, parts.settings(DivergenceSettings), history=history)

    def reset(self) -> None:
        self._count = 0
        self._up = 0  # high accepted values since the level is high enough for a note
        self._recent = SortedWindow(self.steps)
        self._memory: deque[tuple[int, float]] = deque(maxlen=self.MEMORY * self.steps)  # (step, y)
        # Candidates for the lowest level, ascending in count and level: (count, level, scale). The
        # first one is the reference.
        self._lowest: deque[tuple[int, float, float]] = deque()
        self._is_raised = self._is_shifted = False

    def observe(self, obs: Observation) -> list[Finding]:
        value = obs.signals.get(LOSS)
        if not self._is_raised or value is None or not 0.0 < value < math.inf:
            return []
        _, reference, scale = self._lowest[0]
        rise = self._recent.median() - reference
        if math.log(value) <= reference + 0.5 * rise:
            return []
        if rise > self.threshold * scale:
            kind, severity, limit = self.kind, Severity.WEIGHTS_DAMAGED, self.threshold
        elif self._up == self.steps:
            limit = self.SHIFT * self.threshold
            kind, severity = FindingKind.LEVEL_SHIFT, Severity.NOTE
        else:
            return []
        return [
            self.make_finding(
                obs,
                severity,
                signal=LOSS,
                kind=kind,
                value=math.exp(self._recent.median()),
                baseline=math.exp(reference),
                score=rise / scale,
                threshold=limit,
                onset=self.onset(),
            )
        ]

    @property
    def is_raised(self) -> bool:
        """Return whether the rise of the level is more than half of the limit."""
        return self._is_raised

    def _compare(self, level: float) -> None:
        """Compare the level with the reference. Every step reads the result."""
        _, reference, scale = self._lowest[0]
        rise = level - reference
        self._is_raised = rise > 0.5 * self.threshold * scale
        self._is_shifted = self._is_raised and rise > self.SHIFT * self.threshold * scale

    def onset(self) -> int:
        """Return the step at which the present rise began. It has a meaning while `is_raised`."""
        reached, lowest, _ = self._lowest[0]
        middle = 0.5 * (lowest + self._recent.median())
        best, total, onset = 0.0, 0.0, self._memory[-1][0]
        # Half of the values of the lowest level are older than it. Values before those were high
        # because the loss fell.
        since = self._count - reached + self.steps // 2
        for step, y in islice(reversed(self._memory), since):
            total += y - middle
            if total >= best:
                best, onset = total, step
        return onset

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(LOSS)
        if value is None or not 0.0 < value < math.inf:
            return
        y = math.log(value)
        self._count = count = self._count + 1
        recent, scale = self._recent.sorted, self.baseline.scale
        self._recent.push(y)
        self._memory.append((obs.step, y))
        if len(recent) < self.steps:
            return
        level, lowest = recent[len(recent) >> 1], self._lowest
        while lowest and lowest[-1][1] >= level:
            lowest.pop()
        lowest.append((count, level, scale))
        if lowest[0][0] <= count - self.history:
            lowest.popleft()
        self._compare(level)
        if not self._is_shifted:
            self._up = 0
        elif y > 0.5 * (lowest[0][1] + level):
            self._up += 1

    def first_suspect_step(self) -> int | None:
        return self.onset() if self._is_raised else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self._count,
            "up": self._up,
            "memory": [list(pair) for pair in self._memory],
            "lowest": [list(entry) for entry in self._lowest],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._count, self._up = int(state["count"]), int(state["up"])
        self._memory.extend((int(step), float(y)) for step, y in state["memory"])
        self._recent = SortedWindow(self.steps, (y for _, y in self._memory))
        self._lowest.extend(
            (int(count), float(level), float(scale)) for count, level, scale in state["lowest"]
        )
        if self._lowest:
            self._compare(self._recent.median())
