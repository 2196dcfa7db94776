"""Was the remedy enough: has the loss come back to where it was heading before the trouble? Pure.

Before the onset the accepted losses are fitted by a power law, a straight line of log loss over log
step. The slope is the median of the slopes of all pairs (Theil 1950, Sen 1968), so that a handful
of odd values does not bend it, and no rise is extrapolated. Behind the place of the trouble, the
median of the healthy losses is held against the line.

The noise is that of a single loss. The median of n values in normal noise has a standard error of
1.2533 sigma / sqrt(n); that of the line at a distance d from its middle adds sigma^2 (1/m + d^2 /
Sxx).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations

from guardrail.core.records import LossTrend, RecoveryResult

LEAST = 8  # losses from which on a curve is worth something
MOST = 48  # of the newest losses are fitted: 1,128 slopes
MAD_TO_SIGMA, MEDIAN_ERROR = 1.4826, 1.2533
# Standard errors above the line that are an offset, and the least share of the loss that is worth
# the word.
SIGMAS, SHARE = 4.0, 0.01


def fit_trend(points: Sequence[tuple[int, float]]) -> LossTrend | None:
    """The curve of the newest (step, loss in nats) of these; None where there are too few, or
    losses not positive.
    """
    logs = [
        (math.log(step), math.log(loss))
        for step, loss in points[-MOST:]
        if step > 0 and 0.0 < loss < math.inf
    ]
    if len(logs) < LEAST:
        return None
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(logs, 2) if b[0] != a[0]]
    if not slopes:
        return None
    slope = min(0.0, statistics.median(slopes))
    middle = statistics.fmean(x for x, _ in logs)
    level = statistics.median(y - slope * (x - middle) for x, y in logs)
    residuals = [abs(y - level - slope * (x - middle)) for x, y in logs]
    return LossTrend(
        middle=middle,
        level=level,
        slope=slope,
        noise=MAD_TO_SIGMA * statistics.median(residuals),
        spread=sum((x - middle) ** 2 for x, _ in logs),
        count=len(logs),
    )


def expected(curve: LossTrend, step: float) -> float:
    """The loss that a curve leads to at a step, nats a token."""
    return math.exp(curve.level + curve.slope * (math.log(step) - curve.middle))


def compare(
    curve: LossTrend | None, after: Sequence[tuple[int, float]], *, until: float = math.inf
) -> RecoveryResult | None:
    """How the losses behind the trouble stand to the curve; None where there is nothing to compare.

    Args:
        after: (step, loss) of healthy steps from the place of the trouble on.
        until: the curve is followed up to this step. Further on the level that it has there counts,
        and its error.
    """
    logs = [
        (math.log(step), math.log(loss))
        for step, loss in after
        if step > 0 and 0.0 < loss < math.inf
    ]
    if curve is None or not logs:
        return None
    last = math.log(until)
    logs = [(min(x, last), y) for x, y in logs]
    at = statistics.fmean(x for x, _ in logs)
    apart = statistics.median(y - curve.level - curve.slope * (x - curve.middle) for x, y in logs)
    line = 1.0 / curve.count + (at - curve.middle) ** 2 / curve.spread if curve.spread else 1.0
    error = curve.noise * math.sqrt(MEDIAN_ERROR**2 / len(logs) + line)
    expected = math.exp(curve.level + curve.slope * (at - curve.middle))
    return RecoveryResult(
        expected=expected,
        got=expected * math.exp(apart),
        noise=expected * curve.noise,
        offset=expected * math.expm1(apart),
        lasting=apart > max(SIGMAS * error, SHARE),
    )
