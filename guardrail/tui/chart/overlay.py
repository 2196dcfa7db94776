"""What lies on a finished plot: a smoothed line, and the marks of what happened, at the curve's
point of their step.

Shapes as in raster: C dot columns, H x W cells. Costs by columns alone, however many points there
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from guardrail.tui.numerics import raster
from guardrail.tui.numerics.raster import BRAILLE, Columns, Curve, Ink, Plot
from guardrail.tui.numerics.scales import XScale, YScale

_PICKED = 16  # points of a column that its median is taken of
_STEEP = 4  # rows of a column of the curve from which on it is a spike
# What a mark may stand on without hiding the curve, the curve, and what no mark may touch.
_UNDER = frozenset(map(int, (Ink.EMPTY, Ink.RULE, Ink.THRESHOLD, Ink.ABANDONED)))
_CURVE = frozenset(map(int, (Ink.LINE, Ink.SMOOTH)))
_ALONE = frozenset(map(int, (Ink.WARN, Ink.NEWS, Ink.GOOD, Ink.CLIP, Ink.ABANDONED_CLIP)))


class Mark(NamedTuple):
    """A letter with its label ("R2") at a place of the x-axis."""

    x: float
    letter: str
    label: str
    ink: Ink


def smooth_curve(curves: Iterable[Curve], scale: XScale, log: bool, half_life: float) -> np.ndarray:
    """A curve as a line that follows it slowly, in places of the y-axis: float64 [C], NaN where
    nothing is.
    """
    return moving_average(column_medians(curves, scale, log), half_life)


def moving_average(values: np.ndarray, half_life: float) -> np.ndarray:
    """An exponential moving average over dot columns, float64 [C].

    It is divided by the sum of its weights, as Adam corrects its moments (Kingma and Ba 2015,
    section 3): it begins at the curve and not at zero.

    Args:
        half_life: columns after which a value weighs half.
    """
    mask = np.isfinite(values)
    weights = 0.5 ** (np.arange(len(values)) / half_life)
    total = np.convolve(np.where(mask, values, 0.0), weights)[: len(values)]
    weight = np.convolve(mask, weights)[: len(values)]
    found = np.full(len(values), np.nan)
    found[mask] = total[mask] / weight[mask]
    return found


def column_medians(curves: Iterable[Curve], scale: XScale, log: bool, first: int = 0) -> np.ndarray:
    """The median of up to 16 points of each dot column from `first` on, in places of the y-axis:
    one spike does not drag it along. float64 [C - first]

    Args:
        curves: one behind the other.
    """
    found = np.full(scale.dots - first, np.nan)
    for curve in curves:
        at = curve.at(scale.edges(first))
        counts = np.diff(at)
        some = np.flatnonzero(counts)
        if not len(some):
            continue
        picked = at[:-1][some, None] + counts[some, None] * np.arange(_PICKED) // _PICKED
        values = YScale(0.0, 1.0, log).place(curve.y[picked].astype(np.float64))
        values = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)  # NaN comes last
        known = np.isfinite(values).sum(axis=1)
        found[some] = values[np.arange(len(some)), np.maximum(known - 1, 0) // 2]
    return found


def draw_smoothed(plot: Plot, places: np.ndarray) -> None:
    """Draw a line through places of the y-axis; in its cells the raw curve gives way."""
    values = 10.0**places if plot.scale.log else places
    bits = raster.draw_line(
        Columns(values, values, np.zeros(len(values), dtype=bool)), plot.scale, plot.body
    )
    codes, inks = plot.codes[plot.body], plot.inks[plot.body]
    here = bits > 0
    codes[here], inks[here] = BRAILLE + bits[here], Ink.SMOOTH


def put_marks(plot: Plot, scale: XScale, marks: Sequence[Mark]) -> None:
    """Write each mark just above the curve's point, else below it, else on it; the first of the
    list come first.

    A mark where there is no curve stands at the bottom. One that finds no room but on another mark
    is left out.
    """
    height, width = plot.codes.shape
    if height < 2:
        return
    drawn = np.isin(plot.inks, (Ink.LINE, Ink.SMOOTH))
    some = drawn.any(axis=0)
    uppers = np.where(some, drawn.argmax(axis=0), height - 1).tolist()
    lowers = np.where(some, height - 1 - drawn[::-1].argmax(axis=0), height - 1).tolist()
    inks = plot.inks.tolist()  # cells are asked one by one, for which lists are many times as fast
    for mark in marks:
        cell = scale.cell(mark.x)
        if 0 <= cell < width:
            _put_mark(plot, inks, mark, cell, uppers[cell], lowers[cell])


def _put_mark(
    plot: Plot, inks: list[list[int]], mark: Mark, cell: int, upper: int, lower: int
) -> bool:
    """Whether it found a place; `upper` and `lower` are the rows between which the curve is in its
    column.
    """
    beside = [*range(upper - 1, max(-1, upper - 4), -1)]
    if lower - upper < _STEEP:  # below a spike a mark would not be seen to belong to its top
        beside += range(lower + 1, min(len(inks), lower + 3))
    tries = [(row, mark.letter + mark.label, _UNDER) for row in beside]
    tries += [(row, mark.letter, _UNDER) for row in beside]
    tries += [(row, mark.letter, _UNDER | _CURVE) for row in (upper, lower)]
    return any(_write(plot, inks, row, cell, text, mark.ink, under) for row, text, under in tries)


def _write(
    plot: Plot,
    inks: list[list[int]],
    row: int,
    cell: int,
    text: str,
    ink: Ink,
    under: frozenset[int],
) -> bool:
    """Write where all cells are free, and the cells beside hold no other mark that it would be read
    with.
    """
    line, end = inks[row], cell + len(text)
    if end > len(line) or not under.issuperset(line[cell:end]):
        return False
    if not _ALONE.isdisjoint(line[max(0, cell - 1) : end + 1]):
        return False
    plot.codes[row, cell:end] = [ord(char) for char in text]
    plot.inks[row, cell:end] = ink
    line[cell:end] = [int(ink)] * len(text)
    return True
