"""An estimate of how high the harmless outliers of a run are.

Some signals have heavy tails. Example: the loss of one micro-batch jumps by one or two nats every
few hundred steps, and the next step is normal. A fixed score would skip dozens of good updates in
ten thousand steps. So this estimate uses each outlier whose next step was normal. Its limit is a
jump that a harmless outlier reaches only once in `1 / RATE` steps.

The estimate is Hill's (1975) for a power-law tail. It uses the upper half of the last `KEEP`
outliers, and a prior worth `PRIOR` observations of a light tail. The extrapolation to a rate is
peaks over threshold, as in Siffer et al. 2017. Jumps are measured in log units and not in sigmas: a
run whose noise decreases does not have fewer outliers.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

# Outliers remembered: enough for an estimate, few enough that it follows the run.
KEEP = 24
# With fewer outliers there is no limit: three spikes do not make a heavy tail.
LEAST = 8
# Harmless outliers above the limit per step: one in 6,700 steps. The plain threshold must reject
# such a step as well. So fewer than 1 in 10,000 steps are rejected, which does not harm a run.
RATE = 1.5e-4
# Weight of the prior, and its mean excess in log units. That is exponent 10, which nearly normal
# noise has at 5 sigma.
PRIOR, PRIOR_EXCESS = 3.0, 0.1


class BenignOutliers:
    """The last outliers that were harmless, and the limit that follows from them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all outliers."""
        # (accepted steps at that time, log jump)
        self._outliers: deque[tuple[int, float]] = deque(maxlen=KEEP)
        self._fit: tuple[float, float, float] | None = None

    def learn(self, at: int, jump: float) -> None:
        """Add an outlier after which the signal was normal at once.

        Args:
            at: accepted steps up to it.
            jump: log(value / baseline), above 0.
        """
        self._outliers.append((at, jump))
        self._refit()

    def _refit(self) -> None:
        """Compute (least jump of the upper half, its count, exponent) after a new outlier."""
        if len(self._outliers) < LEAST:
            self._fit = None
            return
        jumps = sorted((jump for _, jump in self._outliers), reverse=True)
        count = (len(jumps) + 1) // 2
        least = jumps[count - 1]
        excess = sum(math.log(jump / least) for jump in jumps[:count])
        self._fit = least, count, (count + PRIOR) / (excess + PRIOR * PRIOR_EXCESS)

    def limit(self, now: int) -> float:
        """Return the log jump that harmless outliers exceed at `RATE`; 0: too few were seen.

        Args:
            now: accepted steps so far.
        """
        if self._fit is None:
            return 0.0
        least, count, exponent = self._fit
        rate = count / max(1, now - self._outliers[0][0])
        if rate <= RATE:
            return 0.0
        return least * (rate / RATE) ** (1.0 / exponent)

    def state_dict(self) -> list[list[float]]:
        """Return the outliers as JSON values."""
        return [[at, jump] for at, jump in self._outliers]

    def load_state_dict(self, state: list[Any]) -> None:
        """Take over a state."""
        self._outliers = deque(((int(at), float(jump)) for at, jump in state), maxlen=KEEP)
        self._refit()
