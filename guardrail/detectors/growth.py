"""A gradient norm that climbs by a like factor step after step, none of which is a spike.

The centre of the spike detector follows what it accepts, so a norm that grows by up to a fifth a
step never gets far enough above it: 10 % a step are a factor of 200 in 56 steps without a word.
Diverging runs begin like that while their loss is still flat (BLOOM-176B, Marin-32B).

Three blocks of `BLOCK` accepted values, end to end: the median must rise from the first to the
second AND from the second to the third. One jump, however high, falls into one of the two; drift
over thousands of steps into neither.

At first a note: each of these updates is clipped, so there is no single one to leave out. But the
states since the climb began are not called good, and when the loss follows, the rollback goes back
to before it. A climb that has become `SURE` without a pause is an explosion on its way, and is not
waited for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from guardrail.core.records import Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps
from guardrail.detectors.baseline import Baseline

# Values in a block: odd values out of eight do not move its median, and three blocks are over in 24
# steps.
BLOCK = 8
# Least climb from block to block in log units: 6 % a step, 2.6-fold over both. Slower drift is
# ordinary: norms rise by a few per cent in a hundred steps when the learning rate is warmed up, or
# late in a run.
LEAST = BLOCK * math.log(1.06)
# And in robust sigmas of a single value; the difference of two medians of eight has 0.6 of them, so
# four of its own.
SIGMAS = 2.5
# Factor over the level at which the climb began that is damage and not weather. None of 34 recorded
# runs without such trouble climbs at this pace at all.
SURE = math.log(20.0)
# Steps after which a climb is sure, at the slowest pace that is seen at all.
CLIMB = math.ceil(BLOCK * SURE / LEAST) + 3 * BLOCK


class Growth:
    """Watches one norm.

    Args:
        signal: its name in `Observation.signals`.
        baseline: of the same signal; its scale is the noise. It learns elsewhere.
        warmup: accepted steps before anything is said: the first steps of a run climb and fall as
        they like.
    """

    def __init__(self, signal: str, baseline: Baseline, *, warmup: int) -> None:
        self.signal = signal
        self.signals = (signal,)
        self.baseline = baseline
        self.warmup = warmup
        self.reset()

    def reset(self) -> None:
        self._block: deque[float] = deque(maxlen=BLOCK)
        # (step, median of the last BLOCK)
        self._levels: deque[tuple[int, float]] = deque(maxlen=2 * BLOCK + 1)
        self._since = 0  # step at which the present climb began, 0: none
        self._low = 0.0  # the level there
        self._told = False  # it has been noted once

    def observe(self, obs: Observation) -> list[Finding]:
        value = obs.signals.get(self.signal)
        if not self._since or value is None or not 0.0 < value < math.inf:
            return []
        rise = self._levels[-1][1] - self._low
        # What a persistent finding claims must show in the step itself.
        sure = rise > SURE and math.log(value) > self._low + SURE
        if self._told and not sure:
            return []
        return [
            Finding(
                signal=self.signal,
                step=obs.step,
                kind=FindingKind.GROWTH,
                severity=Severity.PERSISTENT if sure else Severity.NOTE,
                value=math.exp(self._low + rise),
                baseline=math.exp(self._low),
                score=rise / self.baseline.scale,
                threshold=(SURE if sure else 2.0 * self._least()) / self.baseline.scale,
                onset=self._since,
            )
        ]

    def _least(self) -> float:
        return max(LEAST, SIGMAS * self.baseline.scale)

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(self.signal)
        if value is None or not 0.0 < value < math.inf:
            return
        self._told = bool(self._since)
        block, levels = self._block, self._levels
        block.append(math.log(value))
        if len(block) < BLOCK:
            return
        now = sorted(block)[BLOCK >> 1]
        levels.append((obs.step, now))
        if len(levels) <= 2 * BLOCK or self.baseline.count < self.warmup + 2 * BLOCK:
            return
        first = levels[0][1]
        if self._since:
            # half of what it took to begin, or noise at the border would begin it anew
            if now - first < self._least():
                self._since, self._told = 0, False
        elif now - first > LEAST:
            middle, least = levels[BLOCK][1], self._least()
            if middle - first > least and now - middle > least:
                self._since, self._low = levels[0]

    def first_suspect_step(self) -> int | None:
        return self._since or None

    def band(self) -> None:
        """The spike detector of the signal draws its band."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "block": list(self._block),
            "levels": [list(pair) for pair in self._levels],
            "since": self._since,
            "low": self._low,
            "told": self._told,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._block = deque(map(float, state["block"]), maxlen=BLOCK)
        self._levels = deque(
            ((int(step), float(y)) for step, y in state["levels"]), maxlen=2 * BLOCK + 1
        )
        self._since, self._low, self._told = (
            int(state["since"]),
            float(state["low"]),
            bool(state["told"]),
        )
