"""Find the outliers among the samples of a batch, by loss and by gradient norm. Pure.

The score is the distance of the logarithm from the median of ordinary samples, in robust sigmas. A
robust sigma is 1.4826 x the median absolute deviation (Hampel 1974). Iglewicz & Hoaglin (1993) call
3.5 of them an outlier. Ordinary samples are those of healthy batches, run from the same state.
Without enough of them, the samples of the batch itself are used. Bad ones cannot move their median
as long as they are fewer than half.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from guardrail.core.records.record import Record

ENOUGH = 8  # ordinary samples needed for a median
# Robust sigmas. Far above 3.5: in a batch of hundreds of ordinary samples none may be named. A
# median absolute deviation of a dozen samples may be wrong by half.
LIMIT = 6.0
# Least sigmas in log units: 5 % of a loss and 25 % of a gradient norm are no outliers, however
# similar the samples are.
LOSS_FLOOR, GRADIENT_FLOOR = 0.05, 0.25


class Sample(Record, frozen=True, kw_only=True):
    """One row of a batch.

    Attributes:
        position: in the sample order.
        loss: mean over its label tokens, nats; NaN if it has none or the loss is not known.
        tokens: label tokens.
        gradient: norm of the gradient at the output of the embedding, up to a factor that all
            samples share; NaN if it is not known.
    """

    position: int
    loss: float = math.nan
    tokens: int = 0
    gradient: float = math.nan


class Outlier(Record, frozen=True, kw_only=True):
    """A sample with an unusual loss or gradient norm.

    Attributes:
        score: robust sigmas of the loss or the gradient, the larger one; Inf if a number is not
            finite.
        share: of the batch's squared gradient norm at the embedding, in [0, 1]; NaN if it is not
            known.
    """

    sample: Sample
    score: float
    share: float = math.nan


def find_outliers(batch: Sequence[Sample], ordinary: Sequence[Sample]) -> list[Outlier]:
    """Return the outliers among the samples of a batch, the largest score first.

    Args:
        ordinary: samples of healthy batches from the same state.
    """
    losses = _log_scale([s.loss for s in ordinary], [s.loss for s in batch], LOSS_FLOOR)
    gradients = _log_scale(
        [s.gradient for s in ordinary], [s.gradient for s in batch], GRADIENT_FLOOR
    )
    total = sum(sample.gradient**2 for sample in batch)
    outliers: list[Outlier] = []
    for sample in batch:
        if not sample.tokens:
            continue
        score = max(_score(sample.loss, losses), _score(sample.gradient, gradients))
        if score > LIMIT:
            share = sample.gradient**2 / total if 0 < total < math.inf else math.nan
            outliers.append(Outlier(sample=sample, score=score, share=share))
    return sorted(outliers, key=lambda outlier: (-outlier.score, outlier.sample.position))


def select_heaviest(
    outliers: Sequence[Outlier], ordinary: Sequence[Sample], *, part: float
) -> list[Outlier]:
    """Return the outliers with at least this part of the weight of the heaviest one, in order.

    The weight is the excess of the loss, or the squared gradient norm. In a well-trained model all
    samples are similar. The last label of a good sample may be the first token of a bad document.
    Its score is then as high as that of a bad sample, with a hundredth of the weight.
    """
    losses = [sample.loss for sample in ordinary if math.isfinite(sample.loss)]
    usual = statistics.median(losses) if losses else 0.0
    excess = [_weight(outlier.sample.loss - usual) for outlier in outliers]
    squares = [_weight(outlier.sample.gradient**2) for outlier in outliers]
    most, largest = max(excess, default=0.0), max(squares, default=0.0)
    heaviest: list[Outlier] = []
    for outlier, loss, square in zip(outliers, excess, squares, strict=True):
        weight = max(_part_of(loss, most), _part_of(square, largest))
        if outlier.score == math.inf or weight >= part:
            heaviest.append(outlier)
    return heaviest


def _weight(value: float) -> float:
    return 0.0 if math.isnan(value) else max(0.0, value)


def _part_of(value: float, most: float) -> float:
    if not most or math.isinf(most):
        return 0.0
    return value / most


def _log_scale(
    ordinary: Sequence[float], own: Sequence[float], floor: float
) -> tuple[float, float] | None:
    """Return (centre, sigma) of the logarithms; None if there are too few numbers."""
    for values in (ordinary, own):
        logs = [math.log(value) for value in values if 0 < value < math.inf]
        if len(logs) >= ENOUGH or (values is own and len(logs) > 2):
            centre = statistics.median(logs)
            spread = 1.4826 * statistics.median(abs(log - centre) for log in logs)
            return centre, max(floor, spread)
    return None


def _score(value: float, scale: tuple[float, float] | None) -> float:
    if scale is None:
        return 0.0
    if not math.isfinite(value):
        return math.inf
    if value <= 0:
        return 0.0
    centre, sigma = scale
    return (math.log(value) - centre) / sigma
