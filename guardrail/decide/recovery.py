"""Has the loss returned to its trend from before an incident? Pure.

The trend is a power law, fitted to the accepted losses before the onset: a straight line of log
loss over log step. Its slope is the median of the slopes of all pairs (Theil 1950, Sen 1968), so a
few outliers do not change it. A rise is not extrapolated. After the incident, the median of the
healthy losses is compared with the line.

The noise is that of a single loss. The median of n values in normal noise has a standard error of
1.2533 sigma / sqrt(n); that of the line at a distance d from its middle adds sigma^2 (1/m + d^2 /
Sxx).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations

from guardrail.core.records.verdicts import LossTrend, RecoveryResult

LEAST = 8  # losses needed for a trend
MOST = 48  # newest losses that are fitted: 1,128 slopes
MAD_TO_SIGMA, MEDIAN_ERROR = 1.4826, 1.2533
# A loss counts as higher if it is this many standard errors above the line, and by this share.
SIGMAS, SHARE = 4.0, 0.01


def fit_trend(points: Sequence[tuple[int, float]]) -> LossTrend | None:
    """Return the trend of the newest points.

    None if there are too few points with a positive loss.

    Args:
        points: (step, loss in nats per token), ascending.
    """
    logs = _logs(points[-MOST:])
    if len(logs) < LEAST:
        return None
    pairs = combinations(logs, 2)
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x2 != x1]
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


def _logs(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return (log step, log loss) of the points with a positive, finite loss."""
    return [
        (math.log(step), math.log(loss))
        for step, loss in points
        if step > 0 and 0.0 < loss < math.inf
    ]


def expected_loss(curve: LossTrend, step: float) -> float:
    """Return the loss of a trend at a step, nats per token."""
    return math.exp(curve.level + curve.slope * (math.log(step) - curve.middle))


def compare_with_trend(
    curve: LossTrend | None, after: Sequence[tuple[int, float]], *, until: float = math.inf
) -> RecoveryResult | None:
    """Return how the losses after an incident compare with the trend; None if there are none.

    Args:
        after: (step, loss) of healthy steps after the last finding.
        until: the trend is extrapolated up to this step. After it, the level at this step counts,
            and its error.
    """
    logs = _logs(after)
    if curve is None or not logs:
        return None
    last = math.log(until)
    logs = [(min(x, last), y) for x, y in logs]
    middle = statistics.fmean(x for x, _ in logs)
    above = statistics.median(y - curve.level - curve.slope * (x - curve.middle) for x, y in logs)
    line_variance = 1.0
    if curve.spread:
        line_variance = 1.0 / curve.count + (middle - curve.middle) ** 2 / curve.spread
    error = curve.noise * math.sqrt(MEDIAN_ERROR**2 / len(logs) + line_variance)
    expected = math.exp(curve.level + curve.slope * (middle - curve.middle))
    return RecoveryResult(
        expected=expected,
        got=expected * math.exp(above),
        noise=expected * curve.noise,
        offset=expected * math.expm1(above),
        lasting=above > max(SIGMAS * error, SHARE),
    )
