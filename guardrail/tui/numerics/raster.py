"""Draws curves as braille cells, with numpy only: a million points take milliseconds.

No spike is lost, and no spike flattens the rest of the curve.

Shapes: n points of a curve; C = 2 W dot columns and D = 4 (H - 1) dot rows on a plot of H x W
cells. The top row of cells belongs to alarms: `▲` with the value where the axis clips a curve, `×`
where a value is NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from guardrail.tui.numerics.pyramid import Level, reduce_ranges
from guardrail.tui.numerics.scales import XScale, YScale, fit_y_scale, format_short, place_ticks

BRAILLE = 0x2800
# Bit of the dot at [row in cell, column in cell] (Unicode 15, braille patterns).
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], dtype=np.uint16)


class Ink(IntEnum):
    """What a cell shows; the chart gives each a style."""

    EMPTY = 0
    LINE = 1
    ABANDONED = 2
    THRESHOLD = 3
    CLIP = 4
    BAD = 5
    ABANDONED_CLIP = 6
    ABANDONED_BAD = 7
    RULE = 8
    SMOOTH = 9
    WARN = 10  # this and the next two: marks of events
    NEWS = 11
    GOOD = 12


@dataclass(frozen=True, slots=True)
class Curve:
    """Points [first, end) of a curve.

    Attributes:
        x: [n], nondecreasing.
        y: [n], NaN where it is not finite. Where a point stands for several values, one of them.
        bad: [n], y was NaN or Inf; False where it was only absent.
        above: levels of a pyramid over the points, none for a short curve.
        low, high: [n], least and greatest value, where points stand for several values.
    """

    x: np.ndarray
    y: np.ndarray
    bad: np.ndarray
    above: tuple[Level, ...] = ()
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    first: int = 0
    end: int | None = None

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> Curve:
        bad = ~np.isfinite(y)
        if bad.any():
            y = np.where(bad, np.nan, y)
        return cls(x, y, bad)

    @property
    def points(self) -> Level:
        return Level(
            self.y if self.low is None else self.low,
            self.y if self.high is None else self.high,
            self.bad,
        )

    def at(self, edges: np.ndarray) -> np.ndarray:
        """Return the indices of the first points from places of the x-axis on."""
        end = len(self.x) if self.end is None else self.end
        return np.searchsorted(self.x, edges).clip(self.first, end)


@dataclass(frozen=True, slots=True)
class Columns:
    """A curve in dot columns: float64 [C], NaN where there is nothing; bool [C]."""

    low: np.ndarray
    high: np.ndarray
    bad: np.ndarray

    @property
    def filled(self) -> np.ndarray:
        return np.isfinite(self.high)


def dot_columns(curve: Curve, scale: XScale, first: int = 0) -> Columns:
    """Return the least and greatest value of each dot column from `first` on."""
    at = curve.at(scale.edges(first))
    return Columns(*reduce_ranges(curve.points, curve.above, at[:-1], at[1:]))


def merged_dot_columns(curves: Iterable[Curve], scale: XScale, first: int = 0) -> Columns:
    """Return the dot columns of curves that follow each other."""
    nothing = np.full(scale.dots - first, np.nan)
    found = Columns(nothing, nothing, np.zeros(len(nothing), dtype=bool))
    for curve in curves:
        part = dot_columns(curve, scale, first)
        found = Columns(
            np.fmin(found.low, part.low), np.fmax(found.high, part.high), found.bad | part.bad
        )
    return found


def sample_last(x: np.ndarray, y: np.ndarray, scale: XScale, first: int = 0) -> np.ndarray:
    """Return the last value of y in each dot column from `first` on: float64 [C - first].

    It is NaN where a column has no value.
    """
    at = np.searchsorted(x, scale.edges(first))
    some = at[1:] > at[:-1]
    found = np.full(scale.dots - first, np.nan)
    found[some] = y[at[1:][some] - 1]
    return found


@dataclass(slots=True)
class Plot:
    """H x W cells.

    Attributes:
        codes: uint32, code points.
        inks: uint8, `Ink`.
        band: bool, the cell lies between the detector's baseline and its threshold.
        body: the rows below those of the alarms.
        ticks: (cell row, label) of the y-axis.
    """

    codes: np.ndarray
    inks: np.ndarray
    band: np.ndarray
    scale: YScale
    body: slice
    ticks: list[tuple[int, str]] = field(default_factory=list)

    def text(self, row: int) -> str:
        return self.codes[row].astype("<u4").tobytes().decode("utf-32-le")


def draw_plot(
    main: Columns,
    pale: Sequence[Columns],
    *,
    height: int,
    log: bool,
    baseline: np.ndarray | None,
    threshold: np.ndarray | None,
    rules: Sequence[int],
) -> Plot:
    """Draw a curve with abandoned timelines, band and alarms on `height` x C // 2 cells.

    Args:
        pale: abandoned timelines, drawn in single dots.
        baseline, threshold: [C] as `sample` gives them; the band is what lies between.
        rules: cell columns with a vertical dotted line (a rollback, the cursor).
    """
    height, width = max(1, height), len(main.high) // 2
    alarms = height >= 4  # lower plots have no row to spare: alarms lie over the curve
    rows = height - alarms
    dots = 4 * rows
    y = fit_y_scale([(part.low, part.high) for part in (main, *pale)], log=log, threshold=threshold)
    result = Plot(
        np.full((height, width), ord(" "), dtype=np.uint32),
        np.zeros((height, width), dtype=np.uint8),
        np.zeros((height, width), dtype=bool),
        y,
        slice(height - rows, height),
    )
    body = result.body
    drawn = draw_line(main, y, body)
    abandoned = np.zeros_like(drawn)
    for part in pale:
        abandoned |= _cells(_dotted(part, y, dots), width)
    _paint(result, body, drawn, Ink.LINE)
    _paint(result, body, abandoned, Ink.ABANDONED)
    _draw_band(result, body, y, dots, baseline, threshold)
    for cell in rules:
        if 0 <= cell < width:
            free = result.inks[:, cell] == Ink.EMPTY
            result.codes[free, cell], result.inks[free, cell] = ord("┊"), Ink.RULE
    for part in pale:
        _alarms(result, part, y, Ink.ABANDONED_CLIP, Ink.ABANDONED_BAD)
    _alarms(result, main, y, Ink.CLIP, Ink.BAD)
    result.ticks = place_ticks(y, rows, offset=height - rows)
    return result


def draw_line(part: Columns, y: YScale, body: slice) -> np.ndarray:
    """Return the braille bits of a curve: uint16 [rows of the body, W]."""
    return _cells(_line(part, y, 4 * (body.stop - body.start)), len(part.high) // 2)


def _cells(canvas: np.ndarray, width: int) -> np.ndarray:
    """Fold dots bool [D, C] into braille bits uint16 [D / 4, W]."""
    folded = canvas[:, : 2 * width].reshape(len(canvas) // 4, 4, width, 2)
    return np.asarray((folded * _DOTS[None, :, None, :]).sum(axis=(1, 3), dtype=np.uint16))


def _paint(result: Plot, body: slice, bits: np.ndarray, ink: Ink) -> None:
    codes, inks = result.codes[body], result.inks[body]
    here = (bits > 0) & (inks == Ink.EMPTY)
    codes[here] = BRAILLE + bits[here]
    inks[here] = ink


def _clipped_rows(part: Columns, y: YScale, dots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the upper and lower dot row of each column, int [C]; of an empty column any."""
    upper, lower = (y.rows(np.where(part.filled, v, 0.0), dots) for v in (part.high, part.low))
    with np.errstate(invalid="ignore"):
        ends = [
            np.clip(np.nan_to_num(v, nan=0, posinf=dots, neginf=0), 0, dots - 1)
            for v in (upper, lower)
        ]
    return np.rint(ends[0]).astype(np.int64), np.rint(ends[1]).astype(np.int64)


def _line(part: Columns, y: YScale, dots: int) -> np.ndarray:
    """Return dots bool [D, C]: each column from its least to its greatest value.

    Neighbouring columns are joined. The line is broken at NaN.
    """
    upper, lower = _clipped_rows(part, y, dots)
    drawn = part.filled.copy()
    at = np.flatnonzero(drawn)
    canvas = np.zeros((dots + 1, len(drawn)), dtype=np.int32)
    if not len(at):
        return canvas[:dots] > 0
    left, right = at[:-1], at[1:]
    # No line across a column that held nothing but NaN or Inf.
    broken = np.cumsum(part.bad & ~drawn)
    joined = broken[left] == broken[right]
    _bridge(upper, lower, drawn, left[joined], right[joined])
    upper, lower = _meet(upper, lower, np.flatnonzero(drawn[:-1] & drawn[1:]))
    c = np.flatnonzero(drawn)
    np.add.at(canvas, (upper[c], c), 1)
    np.add.at(canvas, (lower[c] + 1, c), -1)
    return canvas.cumsum(axis=0)[:dots] > 0


def _meet(upper: np.ndarray, lower: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Extend columns `left` and left + 1 until they meet: a steep line has no holes."""
    right = left + 1
    new_upper, new_lower = upper.copy(), lower.copy()
    for above, below in ((left, right), (right, left)):
        apart = upper[below] > lower[above] + 1
        above, below = above[apart], below[apart]
        middle = (lower[above] + upper[below]) // 2
        new_lower[above] = np.maximum(new_lower[above], middle)
        new_upper[below] = np.minimum(new_upper[below], middle + 1)
    return new_upper, new_lower


def _bridge(
    upper: np.ndarray, lower: np.ndarray, drawn: np.ndarray, left: np.ndarray, right: np.ndarray
) -> None:
    """Draw straight lines over the empty columns between points: few steps on a wide plot."""
    wide = right - left > 1
    left, right = left[wide], right[wide]
    if not len(left):
        return
    lengths = right - left - 1
    pair = np.repeat(np.arange(len(left)), lengths)
    offset = np.arange(len(pair)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    centre = (upper + lower) / 2
    share = offset / (right - left)[pair]
    row = np.rint(centre[left][pair] * (1 - share) + centre[right][pair] * share).astype(np.int64)
    column = left[pair] + offset
    upper[column] = lower[column] = row
    drawn[column] = True


def _dotted(part: Columns, y: YScale, dots: int) -> np.ndarray:
    """Return the line of an abandoned timeline in every other dot, its extremes in full."""
    canvas = _line(part, y, dots)
    rows, cells = np.indices(canvas.shape)
    canvas &= (rows + cells) % 2 == 0
    at = np.flatnonzero(part.filled)
    upper, lower = _clipped_rows(part, y, dots)
    canvas[upper[at], at] = canvas[lower[at], at] = True
    return canvas


def _draw_band(
    result: Plot,
    body: slice,
    y: YScale,
    dots: int,
    baseline: np.ndarray | None,
    threshold: np.ndarray | None,
) -> None:
    if threshold is None or baseline is None:
        return
    codes, inks, band = result.codes[body], result.inks[body], result.band[body]
    count, width = codes.shape
    with np.errstate(invalid="ignore"):
        limit, base = (
            _cell_rows(values[: 2 * width : 2], y, dots) for values in (threshold, baseline)
        )
        row = np.arange(count)[:, None]
        band |= (row >= limit) & (row <= base)
        here = (row == limit) & (inks == Ink.EMPTY)
    codes[here], inks[here] = ord("┈"), Ink.THRESHOLD


def _cell_rows(values: np.ndarray, y: YScale, dots: int) -> np.ndarray:
    """Return the cell rows of values, as float; infinite values lie far outside of the plot."""
    rows = np.nan_to_num(y.rows(values, dots), nan=np.nan, posinf=4e9, neginf=-4e9)
    return np.asarray(np.floor(rows / 4))


def _alarms(result: Plot, part: Columns, y: YScale, clip: Ink, bad: Ink) -> None:
    """Draw `▲value`, `▼` and `×` at the edges of the plot.

    Each run of clipped cells has one label, where there is room for it.
    """
    height, width = result.codes.shape
    if not width:
        return
    high, low = y.place(part.high), y.place(part.low)
    with np.errstate(invalid="ignore"):
        # Values are float32: 0.002 is not above an axis that ends at 0.002.
        hair = 1e-6 * (y.top - y.bottom) + 2e-7 * max(abs(y.top), abs(y.bottom))
        above = _fold(high > y.top + hair, width)
        below = _fold((low < y.bottom - hair) & part.filled, width)
    wrong = _fold(part.bad, width)
    _put(result, height - 1, below, "▼", clip)
    top = result.inks[0]
    _put(result, 0, above & (top != Ink.BAD) & (top != Ink.CLIP), "▲", clip)
    _put(result, 0, wrong, "×", bad)
    peaks = (
        np.where(np.isfinite(part.high), part.high, -np.inf)[: 2 * width]
        .reshape(width, 2)
        .max(axis=1)
    )
    runs = np.flatnonzero(np.diff(np.concatenate(([False], above, [False]))))
    clipped = sorted(
        zip(runs[::2].tolist(), runs[1::2].tolist(), strict=True),
        key=lambda r: -peaks[r[0] : r[1]].max(),
    )
    for first, end in clipped:
        _label(result, first, end, format_short(float(peaks[first:end].max())), clip)


def _fold(flags: np.ndarray, width: int) -> np.ndarray:
    """Fold flags of dot columns bool [C] into cells bool [W]."""
    return np.asarray(flags[: 2 * width].reshape(width, 2).any(axis=1))


def _put(result: Plot, row: int, where: np.ndarray, glyph: str, ink: Ink) -> None:
    result.codes[row, where] = ord(glyph)
    result.inks[row, where] = ink


def _label(result: Plot, first: int, end: int, text: str, ink: Ink) -> None:
    """Write `text` right of cells [first, end) of the top row, else left of them, else nowhere."""
    width = result.codes.shape[1]
    for start in (end, first - len(text)):
        stop = start + len(text)
        if start < 0 or stop > width:
            continue
        # One free cell beside a label keeps two labels from reading as one number.
        if _free(result, start - (start != end), stop + (start == end)):
            result.codes[0, start:stop] = [ord(c) for c in text]
            result.inks[0, start:stop] = ink
            return


def _free(result: Plot, start: int, stop: int) -> bool:
    inks = result.inks[0, max(0, start) : stop]
    return bool(np.isin(inks, (Ink.EMPTY, Ink.RULE, Ink.THRESHOLD)).all())
