"""What lies on a finished plot: a smoothed line, and the marks of what happened, at the curve's point of their step.

Shapes as in raster: C dot columns, H x W cells. Costs by columns alone, however many points there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from guardrail.tui import raster
from guardrail.tui.raster import BRAILLE, Columns, Curve, Ink, Plot
from guardrail.tui.scales import XScale, YScale

_PICKED = 16  # points of a column that its median is taken of
_UNDER = (Ink.EMPTY, Ink.RULE, Ink.THRESHOLD, Ink.GHOST)  # what a mark may stand on without hiding the curve
_MARKS = (Ink.WARN, Ink.NEWS, Ink.GOOD)


class Mark(NamedTuple):
    """A letter with its label ("R2") at a place of the x-axis."""

    x: float
    letter: str
    label: str
    ink: Ink


def smoothed(curve: Curve, scale: XScale, log: bool, half_life: float) -> np.ndarray:
    """An exponential moving average over dot columns, in places of the y-axis: float64 [C], NaN where nothing is.

    A column counts as the median of up to 16 of its points, so that one spike does not drag the line along. The average
    is divided by the sum of its weights, as Adam corrects its moments (Kingma and Ba 2015, section 3): it begins at the
    curve and not at zero.

    Args:
        half_life: columns after which a value weighs half.
    """
    at = np.searchsorted(curve.x, scale.edges())
    counts = np.diff(at)
    some = np.flatnonzero(counts)
    found = np.full(scale.dots, np.nan)
    if not len(some):
        return found
    picked = at[:-1][some, None] + counts[some, None] * np.arange(_PICKED) // _PICKED
    values = YScale(0.0, 1.0, log).place(curve.y[picked].astype(np.float64))
    values = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)  # NaN comes last
    known = np.isfinite(values).sum(axis=1)
    middle = values[np.arange(len(some)), np.maximum(known - 1, 0) // 2]
    found[some] = middle
    mask = np.isfinite(found)
    weights = 0.5 ** (np.arange(scale.dots) / half_life)
    total = np.convolve(np.where(mask, found, 0.0), weights)[: scale.dots]
    weight = np.convolve(mask, weights)[: scale.dots]
    found[mask] = total[mask] / weight[mask]
    return found


def draw_smoothed(plot: Plot, places: np.ndarray) -> None:
    """Draw a line through places of the y-axis; in its cells the raw curve gives way."""
    values = 10.0**places if plot.scale.log else places
    bits = raster.line(Columns(values, values, np.zeros(len(values), dtype=bool)), plot.scale, plot.body)
    codes, inks = plot.codes[plot.body], plot.inks[plot.body]
    here = bits > 0
    codes[here], inks[here] = BRAILLE + bits[here], Ink.SMOOTH


def put_marks(plot: Plot, scale: XScale, marks: Sequence[Mark]) -> None:
    """Write each mark just above the curve's point, else below it, else on it; the first of the list come first.

    A mark where there is no curve stands at the bottom. One that finds no room but on another mark is left out.
    """
    height, width = plot.codes.shape
    for mark in marks:
        cell = scale.cell(mark.x)
        if height < 2 or not 0 <= cell < width:
            continue
        upper, lower = _reach(plot, cell)
        beside = [*range(upper - 1, max(-1, upper - 4), -1), *range(lower + 1, min(height, lower + 3))]
        text = mark.letter + mark.label
        if not any(_write(plot, row, cell, text, mark.ink, _UNDER) for row in beside) and not any(
            _write(plot, row, cell, mark.letter, mark.ink, under)
            for rows, under in ((beside, _UNDER), ((upper, lower), (*_UNDER, Ink.LINE, Ink.SMOOTH)))
            for row in rows
        ):
            continue


def _reach(plot: Plot, cell: int) -> tuple[int, int]:
    """Upper and lower row of the curve in a column of cells; both the bottom row where there is none."""
    height = len(plot.codes)
    rows = np.flatnonzero(np.isin(plot.inks[:, cell], (Ink.LINE, Ink.SMOOTH)))
    return (int(rows[0]), int(rows[-1])) if len(rows) else (height - 1, height - 1)


def _write(plot: Plot, row: int, cell: int, text: str, ink: Ink, under: Sequence[Ink]) -> bool:
    """Write where all cells are free, and the cell on the left holds no other mark that it would read on from."""
    height, width = plot.codes.shape
    end = cell + len(text)
    if not 0 <= row < height or end > width:
        return False
    inks = plot.inks[row]
    beside = inks[max(0, cell - 1) : min(width, end + 1)]
    if not np.isin(inks[cell:end], under).all() or np.isin(beside, (*_MARKS, Ink.CLIP, Ink.GHOST_CLIP)).any():
        return False
    plot.codes[row, cell:end] = [ord(char) for char in text]
    inks[cell:end] = ink
    return True
