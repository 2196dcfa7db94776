"""Axes: x to dot columns, y to dot rows, round ticks and their labels. Pure numpy.

Both scales are rounded, so that a growing curve does not move in most frames.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# A feature narrower than half of this many dot columns does not set the y-range.
_SMOOTH = 7
# ... unless it is higher by less than this share of the range: then it is shown in full.
_SLACK = 0.5
# Finite values beyond are clipped like spikes, so that no difference of two overflows.
_HUGE = 1e100
# Steps per dot column. Below ten they are integers, so that columns hold the same number of steps.
_X_STEPS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_X_INTEGERS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


_UNITS = ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"))


@dataclass(frozen=True, slots=True)
class XScale:
    """x -> dot column: floor((x - first) / per_dot), for `dots` columns."""

    first: float
    per_dot: float
    dots: int

    @classmethod
    def fit(cls, last: float, dots: int, *, first: float = 0.0, least: float = 50.0) -> XScale:
        """Return the narrowest round scale that shows [first, last]; it changes rarely.

        Args:
            least: the range shown at least, so that the first steps of a run do not fill the plot.
        """
        dots = max(1, dots)
        need = max(last - first, least) * (1 + 1e-9) / dots
        if not math.isfinite(need) or need <= 0:
            return cls(first, 1.0, dots)
        decade = 10.0 ** math.floor(math.log10(need))
        round_steps = _X_INTEGERS if 1 <= need < 10 else _X_STEPS
        fitting = (m * decade for m in round_steps if m * decade >= need)
        per_dot = next(fitting, 10 * decade)
        return cls(first, per_dot, dots)

    @property
    def last(self) -> float:
        return self.first + self.per_dot * self.dots

    def edges(self, first: int = 0) -> np.ndarray:
        """Return the edges of the dot columns from `first` on: float64 [C + 1 - first]."""
        return _edges(self)[first:]

    def cell(self, x: float) -> int:
        """Return the cell column of x; it may lie outside of the plot."""
        return math.floor((x - self.first) / self.per_dot) // 2


@lru_cache(maxsize=64)
def _edges(scale: XScale) -> np.ndarray:
    found = np.asarray(scale.first + scale.per_dot * np.arange(scale.dots + 1))
    found.flags.writeable = False
    return found


@dataclass(frozen=True, slots=True)
class YScale:
    """y -> dot row, 0 at the top. `bottom` and `top` are log10 of the value where `log`."""

    bottom: float
    top: float
    log: bool

    def place(self, y: np.ndarray) -> np.ndarray:
        """Return the places of values on the axis; -inf where they have no logarithm."""
        if not self.log:
            return np.clip(y, -_HUGE, _HUGE)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(
                y > 0,
                np.log10(np.clip(y, 1 / _HUGE, _HUGE)),
                np.where(np.isnan(y), np.nan, -np.inf),
            )

    def rows(self, y: np.ndarray, dots: int) -> np.ndarray:
        """Return the dot rows of values y: floats, not clipped to the plot, may be infinite."""
        with np.errstate(over="ignore"):
            return np.asarray((self.top - self.place(y)) / (self.top - self.bottom) * (dots - 1))


def fit_y_scale(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    log: bool,
    threshold: np.ndarray | None = None,
) -> YScale:
    """Return an axis whose range is not set by a single spike.

    Args:
        parts: (least, greatest) value of each column, of the curve first, then of abandoned
            timelines. These extend the range downwards, upwards only a little.
        threshold: [C], included where it lies near.
    """
    probe = YScale(0.0, 1.0, log)
    lows, highs = (probe.place(values) for values in parts[0])
    some = np.isfinite(highs)
    highs, lows = highs[some], lows[some]
    # On a log axis a column may reach down to zero or below: its upper end counts alone.
    lows = np.where(np.isfinite(lows), lows, highs)
    if not len(highs) and len(parts) > 1:
        return fit_y_scale(parts[1:], log=log)
    if not len(highs):
        return YScale(0.0, 1.0, log)
    bottom, top = float(_smooth(lows).min()), float(_smooth(highs).max())
    bottom = min(bottom, top)
    span = max(top - bottom, 0.02 if log else max(abs(top), abs(bottom)) * 0.01)
    # On a log axis a spike of up to a decade may be twice as high as the rest and is still shown.
    slack = _SLACK * span
    if log:
        slack = max(slack, min(1.0, 2 * span))
    least, most = bottom - slack, top + slack
    for low, _ in parts[1:]:
        # Values below the present ones are no spike: an abandoned timeline may have been healthy.
        lows = probe.place(low)
        if np.isfinite(lows).any():
            bottom = min(bottom, float(_smooth(lows[np.isfinite(lows)]).min()))
    for part in parts:
        for values in map(probe.place, part):
            near = values[(values >= least) & (values <= most)]
            if len(near):
                bottom, top = min(bottom, float(near.min())), max(top, float(near.max()))
    if threshold is not None and len(threshold):
        wanted = probe.place(threshold)
        near = wanted[np.isfinite(wanted) & (wanted <= most) & (wanted >= bottom)]
        if len(near):
            top = max(top, float(near.max()))
    if not log and bottom >= 0:
        return _snap(bottom, top, log, floor=0.0)
    return _snap(bottom, top, log)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the running median.

    The ends are mirrored, so that a spike in the last column counts as narrow too.
    """
    width = _SMOOTH if len(values) >= 4 * _SMOOTH else 3
    if len(values) < width:
        return values
    padded = np.pad(values, width // 2, mode="reflect")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1))


def _snap(bottom: float, top: float, log: bool, *, floor: float = -math.inf) -> YScale:
    """Return a scale with round ends around [bottom, top]; no value lies below `floor`."""
    span = top - bottom
    least = 0.1 if log else max(abs(top), abs(bottom)) * 0.02 or 1.0
    if span < least:
        middle = (top + bottom) / 2
        bottom, top, span = max(floor, middle - least / 2), middle + least / 2, least
    grid = round_up(span / 8)
    # 1e-6: 2.4000001 counts as 2.4 and does not extend the axis by another round step.
    bottom, top = math.floor(bottom / grid + 1e-6) * grid, math.ceil(top / grid - 1e-6) * grid
    bottom = max(floor, bottom)
    return YScale(bottom, top if top > bottom else bottom + grid, log)


def round_up(value: float) -> float:
    """Return the least of 1, 2, 2.5, 5 x 10^k that is not below `value`."""
    if not math.isfinite(value) or value <= 0:
        return 1.0
    decade = 10.0 ** math.floor(math.log10(value))
    return next(
        (m * decade for m in (1.0, 2.0, 2.5, 5.0) if m * decade >= value * (1 - 1e-9)), 10 * decade
    )


def place_ticks(y: YScale, rows: int, *, offset: int = 0) -> list[tuple[int, str]]:
    """Return (cell row, label) of round values, about one in three rows, from top to bottom."""
    wanted = max(2, rows // 3)
    if y.log:
        values = _log_ticks(y, wanted)
        labels = [format_short(value) for value in values]
    else:
        values = _linear_ticks(y.bottom, y.top, wanted)
        labels = format_labels(values)
    dots = 4 * rows
    placed: dict[int, str] = {}
    for value, label in zip(values, labels, strict=True):
        row = round(float(y.rows(np.array([value]), dots)[0])) // 4
        is_free = not {row - 1, row, row + 1} & placed.keys()
        # Two values may have the same label of seven characters: then it is shown once.
        if 0 <= row < rows and is_free and label not in placed.values():
            placed[row] = label
    return sorted((row + offset, label) for row, label in placed.items())


def _linear_ticks(bottom: float, top: float, wanted: int) -> list[float]:
    step = round_up((top - bottom) / wanted)
    first = math.ceil(bottom / step - 1e-6)
    return [k * step for k in range(first, first + 64) if k * step <= top + step * 1e-6]


def _log_ticks(y: YScale, wanted: int) -> list[float]:
    """Return decades, or every second (third, ...) one where there are many.

    Where there are fewer than two, return 1-2-5 values, else linear ones.
    """
    first, last = math.ceil(y.bottom - 1e-9), math.floor(y.top + 1e-9)
    if last - first >= 1:
        stride = max(1, math.ceil((last - first) / wanted))
        return [10.0**k for k in range(math.ceil(first / stride) * stride, last + 1, stride)]
    finer = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5)]
    found = [v for v in finer if y.bottom - 1e-9 <= math.log10(v) <= y.top + 1e-9]
    if len(found) >= 2:
        return found
    return _linear_ticks(10.0**y.bottom, 10.0**y.top, wanted)


def format_labels(values: Sequence[float]) -> list[str]:
    """Return short labels with the same number of decimals, enough to differ from each other."""
    if not values:
        return []
    largest = max(abs(v) for v in values)
    if largest >= 1e5 or largest < 1e-3 or min(abs(v) for v in values if v) < 1e-4 * largest:
        return [format_short(v) for v in values]
    gap = min((abs(b - a) for a, b in itertools.pairwise(values)), default=largest)
    if largest >= 1e4 and len(set(map(format_short, values))) == len(values):
        return [format_short(v) for v in values]
    decimals = next((d for d in range(6) if abs(round(gap, d) - gap) < 1e-3 * gap), 5)
    return [f"{v:.{decimals}f}" for v in values]


def format_short(value: float) -> str:
    """Return a number in at most eight characters, seven without a sign.

    For example 0.0312, 11.5, 1.2k, 3e12, NaN.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        text = f"{value:.2g}" if 1e-99 < size < 1e99 else f"{value:.0e}"
        return text.replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    divisor, unit = next(
        (d, u) for limit, d, u in _UNITS if size < limit * 0.9995 or limit == _UNITS[-1][0]
    )
    return f"{value / divisor:.3g}{unit}"
