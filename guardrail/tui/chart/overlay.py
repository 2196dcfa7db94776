"""What is drawn over a finished plot: a smoothed line, and the marks of events on the curve.

Shapes as in raster: C dot columns, H x W cells. The cost depends on the columns only, not on
the points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from guardrail.tui.numerics import raster
from guardrail.tui.numerics.raster import BRAILLE, Columns, Curve, Ink, Plot
from guardrail.tui.numerics.scales import XScale, YScale

_PICKED = 16  # points of a column that its median is computed from
_STEEP = 4  # rows of the curve in one column from which on it is a spike
# What a mark may cover without hiding the curve; the curve; and what no mark may touch.
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
    """Return a smoothed curve in places of the y-axis: float64 [C], NaN where there is no value."""
    return moving_average(column_medians(curves, scale, log), half_life)


def moving_average(values: np.ndarray, half_life: float) -> np.ndarray:
    """Return an exponential moving average over dot columns, float64 [C].

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
    """Return the median of up to 16 points of each dot column from `first` on: float64 [C - first].

    The values are places of the y-axis. A single spike does not change a median.

    Args:
        curves: they follow each other.
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
    """Draw a line through places of the y-axis; it replaces the raw curve in its cells."""
    values = places
    if plot.scale.log:
        values = 10.0**places
    bits = raster.draw_line(
        Columns(values, values, np.zeros(len(values), dtype=bool)), plot.scale, plot.body
    )
    codes, inks = plot.codes[plot.body], plot.inks[plot.body]
    here = bits > 0
    codes[here], inks[here] = BRAILLE + bits[here], Ink.SMOOTH


def put_marks(plot: Plot, scale: XScale, marks: Sequence[Mark]) -> None:
    """Write each mark just above the curve's point, else below it, else on it.

    The first marks of the list choose first. A mark without a curve stands at the bottom. A mark
    that has room only on another mark is not drawn.
    """
    height, width = plot.codes.shape
    if height < 2:
        return
    drawn = np.isin(plot.inks, (Ink.LINE, Ink.SMOOTH))
    some = drawn.any(axis=0)
    uppers = np.where(some, drawn.argmax(axis=0), height - 1).tolist()
    lowers = np.where(some, height - 1 - drawn[::-1].argmax(axis=0), height - 1).tolist()
    inks = plot.inks.tolist()  # single cells are read, which is many times as fast in lists
    for mark in marks:
        cell = scale.cell(mark.x)
        if 0 <= cell < width:
            _put_mark(plot, inks, mark, cell, uppers[cell], lowers[cell])


def _put_mark(
    plot: Plot, inks: list[list[int]], mark: Mark, cell: int, upper: int, lower: int
) -> bool:
    """Draw a mark; return whether it found a place.

    Args:
        upper, lower: rows between which the curve lies in its column.
    """
    beside = [*range(upper - 1, max(-1, upper - 4), -1)]
    if lower - upper < _STEEP:  # a mark below a spike would be far from its top
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
    """Write a text where all its cells may be covered and no mark stands beside it."""
    line, end = inks[row], cell + len(text)
    if end > len(line) or not under.issuperset(line[cell:end]):
        return False
    if not _ALONE.isdisjoint(line[max(0, cell - 1) : end + 1]):
        return False
    plot.codes[row, cell:end] = [ord(char) for char in text]
    plot.inks[row, cell:end] = ink
    line[cell:end] = [int(ink)] * len(text)
    return True
