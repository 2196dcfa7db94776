"""Which samples of a batch stand out, by their loss and by their share of the gradient. Pure.

The score is the distance of the logarithm from the median of ordinary samples in robust sigmas
(1.4826 x the median absolute deviation; Hampel 1974, Iglewicz & Hoaglin 1993, who call 3.5 an
outlier). Ordinary are the samples of healthy batches that the same state was shown; without enough
of them, the batch's own, whose median the bad ones cannot move as long as they are fewer than half.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from guardrail.core.records import Record

ENOUGH = 8  # ordinary samples behind a median
# Robust sigmas. Far beyond 3.5: a batch of hundreds of ordinary samples must name none, and a
# median absolute deviation of a dozen samples may be off by half.
LIMIT = 6.0
# Least sigmas in log units: 5 % of a loss, 25 % of a gradient norm are no outliers, however alike
# the samples are.
LOSS_FLOOR, GRADIENT_FLOOR = 0.05, 0.25


class Sample(Record, frozen=True, kw_only=True):
    """One row of a batch.

    Attributes:
        position: in the sample order.
        loss: mean over its label tokens, nats; NaN where it has none, or where nobody told.
        tokens: label tokens.
        gradient: norm of the gradient at the output of the embedding, up to a factor that all
            samples share; NaN where nobody told.
    """

    position: int
    loss: float = math.nan
    tokens: int = 0
    gradient: float = math.nan


class Outlier(Record, frozen=True, kw_only=True):
    """A sample that stands out.

    Attributes:
        score: robust sigmas of the loss or the gradient, whichever is further out; Inf where a
        number is not finite.
        share: of the batch's squared gradient norm at the embedding, in [0, 1]; NaN where it cannot
        be told.
    """

    sample: Sample
    score: float
    share: float = math.nan


def outliers(batch: Sequence[Sample], ordinary: Sequence[Sample]) -> list[Outlier]:
    """The samples of a batch that stand out, furthest first.

    Args:
        ordinary: samples of healthy batches from the same state.
    """
    losses = _scale(
        [sample.loss for sample in ordinary], [sample.loss for sample in batch], LOSS_FLOOR
    )
    gradients = _scale([s.gradient for s in ordinary], [s.gradient for s in batch], GRADIENT_FLOOR)
    squares = [sample.gradient**2 for sample in batch]
    total = sum(squares)
    found = []
    for sample, square in zip(batch, squares, strict=True):
        if not sample.tokens:
            continue
        score = max(_score(sample.loss, losses), _score(sample.gradient, gradients))
        if score > LIMIT:
            share = square / total if 0 < total < math.inf else math.nan
            found.append(Outlier(sample=sample, score=score, share=share))
    return sorted(found, key=lambda outlier: (-outlier.score, outlier.sample.position))


def foremost(found: Sequence[Outlier], ordinary: Sequence[Sample], *, part: float) -> list[Outlier]:
    """Those outliers that have this part in what the batch shows: of the greatest excess of loss or
    of the greatest squared gradient among them, in their order.

    Samples of a well-trained model are so alike that one whose last label is the first token of a
    bad document stands out as clearly, with a hundredth of its weight.
    """
    losses = [sample.loss for sample in ordinary if math.isfinite(sample.loss)]
    usual = statistics.median(losses) if losses else 0.0
    excess = [_weight(outlier.sample.loss - usual) for outlier in found]
    squares = [_weight(outlier.sample.gradient**2) for outlier in found]
    most, longest = max(excess, default=0.0), max(squares, default=0.0)
    return [
        outlier
        for outlier, loss, square in zip(found, excess, squares, strict=True)
        if outlier.score == math.inf or _part(loss, most) >= part or _part(square, longest) >= part
    ]


def _weight(value: float) -> float:
    return 0.0 if math.isnan(value) else max(0.0, value)


def _part(value: float, most: float) -> float:
    return 0.0 if not most or math.isinf(most) else value / most


def _scale(
    ordinary: Sequence[float], own: Sequence[float], floor: float
) -> tuple[float, float] | None:
    """(centre, sigma) of the logarithms; None where nothing is known."""
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
    return (math.log(value) - scale[0]) / scale[1] if value > 0 else 0.0
