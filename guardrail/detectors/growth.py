"""A gradient norm grows by a similar factor at each step, and no step is a spike.

The centre of the spike detector follows the accepted values. So a norm that grows by up to 20 % a
step is never far enough above it. 10 % a step is a factor of 200 in 56 steps without a finding.
Diverging runs begin like that while their loss is still flat (BLOOM-176B, Marin-32B).

Three consecutive blocks of `BLOCK` accepted values are compared. The median must rise from the
first to the second AND from the second to the third. A single jump of any height falls into one of
the two. Drift over thousands of steps falls into neither.

The first finding is a note: each of these updates is clipped, so there is no single one to skip.
But states since the start of the growth do not count as good. If the loss rises too, the rollback
restores a state from before the growth. A growth that reaches `SURE` without a pause leads to an
explosion. It calls for a rollback at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, UPDATE_NORM
from guardrail.detectors.base import Detector, DetectorParts, LogJumps
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.spike import Spike
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import EmbedNormSpike, GradNormSpike, UpdateNormSpike

# Values in a block. A few odd values out of eight do not move its median, and three blocks are over
# in 24 steps.
BLOCK = 8
# Smallest growth from block to block in log units: 6 % a step, 2.6-fold over both. Slower drift is
# normal: during warm-up of the learning rate, or late in a run, norms rise by a few per cent in a
# hundred steps.
LEAST = BLOCK * math.log(1.06)
# The same in robust sigmas of a single value. The difference of two medians of eight has a sigma of
# 0.6 of that, so this is four sigmas of the difference.
SIGMAS = 2.5
# Factor over the level at the start of the growth that is damage. None of 34 recorded runs without
# such an anomaly grows at this pace at all.
SURE = math.log(20.0)
# Steps after which a growth is sure, at the slowest pace that is found.
CLIMB = math.ceil(BLOCK * SURE / LEAST) + 3 * BLOCK


class Growth(Detector):
    """Judges one norm. Base of the detectors below.

    Attributes:
        signal: its name in `Observation.signals`.
        spike: the spike detector of the same signal.

    Args:
        baseline: of the spike detector, which learns it; its scale is the noise.
        min_history: accepted steps before the first report. Norms rise and fall freely in the first
            steps of a run.
    """

    kind = FindingKind.GROWTH
    severities = (Severity.NOTE, Severity.WEIGHTS_DAMAGED)
    Settings = SpikeSettings
    keys = ("detectors.spike.min_history",)
    damage_is_in_weights = True
    title = "Growth of a norm"
    help = """\
A gradient norm grows by a similar factor at each step, and no step is a spike. BLOOM-176B and
Marin-32B began like that while their loss was still flat. A growth of 10 % a step is a factor of
200 in 56 steps.

- Three consecutive blocks of 8 accepted values are compared. The median must rise from the first
  to the second, and from the second to the third.
- **Limit of a note:** 6 % a step in each of both, and 2.5 robust standard deviations of a single
  value.
- **Limit of `persistent`:** a factor of 20 over the level at which the growth began.
- States since the start of the growth are not called good. A later rollback goes back to before
  it.
- It is silent until `min_history` + 16 accepted steps.
- **Test:** `tests/unit/detectors/test_growth.py`."""

    signal: str
    spike: ClassVar[type[Spike]]

    def __init__(self, baseline: Baseline, *, min_history: int) -> None:
        self.baseline = baseline
        self.min_history = min_history
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> Growth:
        return cls(
            parts.get(cls.spike).baseline, min_history=parts.settings(SpikeSettings).min_history
        )

    def reset(self) -> None:
        self._block: deque[float] = deque(maxlen=BLOCK)
        # (step, median of the last BLOCK)
        self._levels: deque[tuple[int, float]] = deque(maxlen=2 * BLOCK + 1)
        self._since = 0  # step at which the present growth began, 0: none
        self._low = 0.0  # the level there
        self._is_noted = False  # it has been noted once

    # -- judging -----------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> list[Finding]:
        value = obs.signals.get(self.signal)
        if not self._since or value is None or not 0.0 < value < math.inf:
            return []
        rise = self._levels[-1][1] - self._low
        # A finding of damage must also show in the step itself.
        is_sure = rise > SURE and math.log(value) > self._low + SURE
        if self._is_noted and not is_sure:
            return []
        severity, limit = Severity.NOTE, 2.0 * self._least()
        if is_sure:
            severity, limit = Severity.WEIGHTS_DAMAGED, SURE
        return [
            self.make_finding(
                obs,
                severity,
                signal=self.signal,
                value=math.exp(self._low + rise),
                baseline=math.exp(self._low),
                score=rise / self.baseline.scale,
                threshold=limit / self.baseline.scale,
                onset=self._since,
            )
        ]

    def _least(self) -> float:
        return max(LEAST, SIGMAS * self.baseline.scale)

    def first_suspect_step(self) -> int | None:
        return self._since or None

    # -- learning ----------------------------------------------------------------------------------

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(self.signal)
        if value is None or not 0.0 < value < math.inf:
            return
        self._is_noted = bool(self._since)
        block, levels = self._block, self._levels
        block.append(math.log(value))
        if len(block) < BLOCK:
            return
        now = sorted(block)[BLOCK >> 1]
        levels.append((obs.step, now))
        if len(levels) <= 2 * BLOCK or self.baseline.count < self.min_history + 2 * BLOCK:
            return
        first = levels[0][1]
        if self._since:
            # Half of the growth that starts it. Otherwise noise at the limit would start it again.
            if now - first < self._least():
                self._since, self._is_noted = 0, False
        elif now - first > LEAST:
            middle, least = levels[BLOCK][1], self._least()
            if middle - first > least and now - middle > least:
                self._since, self._low = levels[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "block": list(self._block),
            "levels": [list(pair) for pair in self._levels],
            "since": self._since,
            "low": self._low,
            "told": self._is_noted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._block = deque(map(float, state["block"]), maxlen=BLOCK)
        self._levels = deque(
            ((int(step), float(y)) for step, y in state["levels"]), maxlen=2 * BLOCK + 1
        )
        self._since = int(state["since"])
        self._low = float(state["low"])
        self._is_noted = bool(state["told"])


class GradNormGrowth(Growth):
    """Judges the norm of all gradients."""

    name, signal, signals = "growth", GRAD_NORM, (GRAD_NORM,)
    spike = GradNormSpike


class EmbedNormGrowth(Growth):
    """Judges the norm of the embedding gradients."""

    name, signal, signals = "embed_growth", EMBED_GRAD_NORM, (EMBED_GRAD_NORM,)
    spike = EmbedNormSpike


class UpdateNormGrowth(Growth):
    """Judges the norm of the update."""

    name, signal, signals = "update_growth", UPDATE_NORM, (UPDATE_NORM,)
    spike = UpdateNormSpike
