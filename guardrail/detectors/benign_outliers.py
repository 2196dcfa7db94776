"""How high the harmless outliers of a run are.

Some signals are heavy-tailed by nature: a loss that is printed for one micro-batch jumps by one or
two nats every few hundred steps, and the next step is as before. Left to the scale alone, a fixed
score would leave out dozens of good updates in ten thousand steps. So an outlier that came back by
itself, within one step, teaches the tail; the tail says which jump is so high that this run would
show a harmless one only once in `1 / RATE` steps.

The estimate is Hill's (1975) for a power-law tail, on the upper half of the last `KEEP` outliers,
with a prior worth `PRIOR` observations of a light tail; extrapolating to a rate is peaks over
threshold as in Siffer et al. 2017. Jumps are measured in log units and not in sigmas: a run that
grows quieter has not grown less prone to outliers.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

# Outliers remembered: enough for an estimate, few enough that it follows the run.
KEEP = 24
# With fewer outliers nothing is said: three spikes do not make a heavy tail.
LEAST = 8
# Harmless outliers above the limit, a step. One in 6,700 steps: below the 1 in 10,000 rejections
# that a run should not notice, since the limit is reached only by those that the plain score
# rejects as well.
RATE = 1.5e-4
# The prior's weight, and its mean excess in log units: exponent 10, what noise that is nearly
# normal has at 5 sigma.
PRIOR, PRIOR_EXCESS = 3.0, 0.1


class BenignOutliers:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        # (accepted steps at that time, log jump)
        self._outliers: deque[tuple[int, float]] = deque(maxlen=KEEP)
        self._fit: tuple[float, float, float] | None = None

    def learn(self, at: int, jump: float) -> None:
        """An outlier came back by itself. `at` counts accepted steps; `jump` is log(value /
        baseline) > 0.
        """
        self._outliers.append((at, jump))
        self._refit()

    def _refit(self) -> None:
        """(least jump of the upper half, its count, exponent): they change only with a new
        outlier.
        """
        if len(self._outliers) < LEAST:
            self._fit = None
            return
        jumps = sorted((jump for _, jump in self._outliers), reverse=True)
        count = (len(jumps) + 1) // 2
        least = jumps[count - 1]
        excess = sum(math.log(jump / least) for jump in jumps[:count])
        self._fit = least, count, (count + PRIOR) / (excess + PRIOR * PRIOR_EXCESS)

    def limit(self, now: int) -> float:
        """The log jump that harmless outliers exceed at `RATE`; 0 while too few have been seen."""
        if self._fit is None:
            return 0.0
        least, count, exponent = self._fit
        rate = count / max(1, now - self._outliers[0][0])
        return least * (rate / RATE) ** (1.0 / exponent) if rate > RATE else 0.0

    def state_dict(self) -> list[list[float]]:
        return [[at, jump] for at, jump in self._outliers]

    def load_state_dict(self, state: list[Any]) -> None:
        self._outliers = deque(((int(at), float(jump)) for at, jump in state), maxlen=KEEP)
        self._refit()
