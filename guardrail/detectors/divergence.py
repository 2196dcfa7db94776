"""The loss rose and stays up: slow divergence, or a step to a worse level that no single value gave
away.

The level of the loss is the median of the logarithms of the last `steps` accepted steps. It is held
against the lowest level of the last `window` accepted steps, which a rise cannot lift: the baseline
is from before it. What is rejected never gets here, so this is damage that is in the weights
already, and the finding is persistent. A rise that is too small for that and neither grows nor goes
away is noted as a level shift.

The onset is where the last values part best into "before" and "after": the k that maximises the sum
over i >= k of y[i] - middle, with the middle between reference and present level (the
maximum-likelihood change point of a step in normal noise, Hinkley 1970).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

from guardrail.core.records import LOSS, Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps
from guardrail.detectors.baseline import Baseline, SortedWindow


class Divergence:
    """Watches the loss.

    Args:
        baseline: of the loss spikes; its scale is the noise of a single value. It learns elsewhere.
        score: robust sigmas of rise that count.
        steps: accepted steps in the level; a sudden step is found after more than half of them.
        window: accepted steps within which the reference level lies.
    """

    # Share of the score at which a level that has stood for `steps` steps is worth a note: far
    # enough above the half at which states become suspect that the wandering of smoothed losses
    # does not get there.
    SHIFT = 0.65
    # Accepted steps kept for the onset, in multiples of `steps`: a slow rise began before the level
    # showed it.
    MEMORY = 3
    signals = (LOSS,)

    def __init__(self, baseline: Baseline, *, score: float, steps: int, window: int) -> None:
        self.baseline = baseline
        self.score = score
        self.steps = steps
        self.window = window
        self.reset()

    def reset(self) -> None:
        self._count = 0
        self._up = 0  # high accepted values since the level has been worth a note
        self._recent = SortedWindow(self.steps)
        self._memory: deque[tuple[int, float]] = deque(maxlen=self.MEMORY * self.steps)  # (step, y)
        # Candidates for the lowest level: (count, level, scale), ascending in both; the first is
        # the reference.
        self._lowest: deque[tuple[int, float, float]] = deque()
        self._raised = self._shifted = False

    def observe(self, obs: Observation) -> list[Finding]:
        value = obs.signals.get(LOSS)
        if not self._raised or value is None or not 0.0 < value < math.inf:
            return []
        _, reference, scale = self._lowest[0]
        rise = self._recent.median() - reference
        diverges = rise > self.score * scale
        if not (diverges or self._up == self.steps) or math.log(value) <= reference + 0.5 * rise:
            return []
        return [
            Finding(
                signal=LOSS,
                step=obs.step,
                kind=FindingKind.DIVERGENCE if diverges else FindingKind.LEVEL_SHIFT,
                severity=Severity.PERSISTENT if diverges else Severity.NOTE,
                value=math.exp(self._recent.median()),
                baseline=math.exp(reference),
                score=rise / scale,
                threshold=self.score if diverges else self.SHIFT * self.score,
                onset=self.onset(),
            )
        ]

    @property
    def raised(self) -> bool:
        """Whether the level stands half as high over its reference as divergence takes."""
        return self._raised

    def _settle(self, level: float) -> None:
        """How the level stands to the reference now; every step asks for it."""
        _, reference, scale = self._lowest[0]
        rise = level - reference
        self._raised = rise > 0.5 * self.score * scale
        self._shifted = self._raised and rise > self.SHIFT * self.score * scale

    def onset(self) -> int:
        """The step at which the present rise began; only meaningful while `raised`."""
        reached, lowest, _ = self._lowest[0]
        middle = 0.5 * (lowest + self._recent.median())
        best, total, onset = 0.0, 0.0, self._memory[-1][0]
        # Half of the values of the lowest level are older than it: what is older still was high
        # because the loss fell.
        since = self._count - reached + self.steps // 2
        for step, y in islice(reversed(self._memory), since):
            total += y - middle
            if total >= best:
                best, onset = total, step
        return onset

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
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
        if lowest[0][0] <= count - self.window:
            lowest.popleft()
        self._settle(level)
        if not self._shifted:
            self._up = 0
        elif y > 0.5 * (lowest[0][1] + level):
            self._up += 1

    def first_suspect_step(self) -> int | None:
        return self.onset() if self.raised else None

    def band(self) -> None:
        """The spike detector of the loss draws its band."""
        return None

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
            self._settle(self._recent.median())
