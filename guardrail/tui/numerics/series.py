"""Metric rows as curves: the present timeline, and the abandoned ones. A series never changes.

Of a long run the older rows are summed up: a point stands for several consecutive rows, with the
least and the greatest value, so that no spike is lost. Where the viewer zooms in, their rows are
read again: a `Detail`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.tui.numerics.pyramid import Level
from guardrail.tui.numerics.raster import Curve, sample_last
from guardrail.tui.numerics.scales import XScale

# each row has them: one that is not finite was NaN or Inf
SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)
BANDS = tuple(f"{signal}_{part}" for signal in SIGNALS for part in ("baseline", "threshold"))
THROUGHPUT = "throughput"  # label tokens a second, of two columns
STEP, TOKENS, TIME = "step", "tokens", "time"
AXES = (STEP, TOKENS, TIME)
_NO_SIGNALS = frozenset(
    ("step", "timeline", "time", "first", "last", "verdict", "tokens", "slowest_rank")
)
_SEARCHED = 4096  # points searched at once for the last value of a column with gaps


class Detail(NamedTuple):
    """Rows that were read again: rows [first, end) of the file.

    They hold all rows of the present timeline with steps in [low, high].
    """

    series: Series
    first: int
    end: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Series:
    """One timeline as points: the first `thin` stand for several rows each, the others for one.

    Attributes:
        step: float64 [n], nondecreasing, of a point's last row. A rejected attempt and the one that
            replaced it have the same step.
        values: column -> float32 [n], of a point's last row. For a column that not all rows have,
            the last known one. NaN where there is none.
        bad: signal -> bool [n]: a value was NaN or Inf.
        abandoned: abandoned timelines, oldest first.
        axes: axis -> float64 [n], nondecreasing: tokens trained on, seconds of the clock.
        above: signal -> levels of a pyramid over the rows from `thin` on.
        low, high: signal -> float32 [thin], least and greatest value; NaN where there is none.
        low_above: signal -> levels of a pyramid over the points before `thin`.
        row: int64 [n], the number in the file of a point's last row.
        details: rows of ranges that are summed up.
        stem: two series with the same stem begin with the same points; None: not known.
    """

    step: np.ndarray = field(default_factory=lambda: np.zeros(0))
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    bad: Mapping[str, np.ndarray] = field(default_factory=dict)
    abandoned: tuple[Series, ...] = ()
    axes: Mapping[str, np.ndarray] = field(default_factory=dict)
    above: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    thin: int = 0
    low: Mapping[str, np.ndarray] = field(default_factory=dict)
    high: Mapping[str, np.ndarray] = field(default_factory=dict)
    low_above: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    details: tuple[Detail, ...] = ()
    stem: object = None

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last_step(self) -> float:
        return float(self.step[-1]) if len(self.step) else 0.0

    def along(self, axis: str) -> np.ndarray:
        """Return the places of the points, float64 [n]: their steps where the axis is not known."""
        return self.axes.get(axis, self.step)

    def end(self, axis: str) -> float:
        """Return the end of the x-axis: of the present or of any abandoned timeline."""
        ends = [one.along(axis)[-1] for one in (self, *self.abandoned) if len(one)]
        return float(max(ends, default=0.0))

    def place(self, step: float, axis: str) -> float:
        """Return the place of a step on an axis: that of the last row up to it."""
        return float(self.places(np.array([step]), axis)[0])

    def places(self, steps: np.ndarray, axis: str) -> np.ndarray:
        """Return the places of many steps, float64 [n]."""
        if axis not in self.axes or not len(self):
            return steps
        rows = np.searchsorted(self.step, steps, side="right")
        found = np.asarray(self.axes[axis][np.maximum(0, rows - 1)])
        for detail in self.details:
            closer = (steps >= detail.series.step[0]) & (steps <= detail.high)
            found[closer] = detail.series.places(steps[closer], axis)
        return found

    def step_at(self, x: float, axis: str) -> float:
        """Return the step of the last row up to a place on an axis."""
        if axis not in self.axes or not len(self):
            return x
        for detail in self.details:
            places = detail.series.axes[axis]
            if places[0] <= x <= places[-1]:
                return detail.series.step_at(x, axis)
        row = int(np.searchsorted(self.axes[axis], x, side="right"))
        return float(self.step[max(0, row - 1)])

    # -- drawing

    def curves(self, signal: str, axis: str = STEP) -> Iterator[Curve]:
        """Yield the points of a signal as curves that follow each other.

        Rows that were read again replace the points that sum them up.
        """
        for part, first, end in self._parts:
            if signal in part.values and signal in part.bad:
                yield from part._own_curves(signal, axis, first, end)

    def _own_curves(self, signal: str, axis: str, first: int, end: int) -> Iterator[Curve]:
        """Yield points [first, end): those that sum up rows, then single rows."""
        x, y, bad, thin = self.along(axis), self.values[signal], self.bad[signal], self.thin
        if first < thin:
            yield Curve(x[:thin], y[:thin], bad[:thin], self.low_above.get(signal, ()), self.low[signal],
                        self.high[signal], first=first, end=min(end, thin))  # fmt: skip
        if end > thin or not thin:
            yield Curve(x[thin:], y[thin:], bad[thin:], self.above.get(signal, ()), first=max(0, first - thin),
                        end=end - thin)  # fmt: skip

    def sampled(self, column: str, axis: str, scale: XScale, first_dot: int = 0) -> np.ndarray:
        """Return the last value of a column in each dot column: float64 [C - first_dot].

        It is NaN where a dot column has no value.
        """
        found = np.full(scale.dots - first_dot, np.nan)
        for part, first, end in self._parts:
            closer = sample_last(
                part.along(axis)[first:end], part.values[column][first:end], scale, first_dot
            )
            np.copyto(found, closer, where=np.isfinite(closer))
        return found

    @cached_property
    def _parts(self) -> Sequence[tuple[Series, int, int]]:
        """Return (series, first point, end) that follow each other and cover all rows."""
        found: list[tuple[Series, int, int]] = []
        at = 0
        for detail in sorted(self.details, key=lambda one: one.first):
            # A point is replaced if all of its rows are in the detail. Its rows begin after the
            # last row of the point before.
            begin = int(np.searchsorted(self.row, detail.first - 1)) + 1 if detail.first else 0
            end = int(np.searchsorted(self.row, detail.end))
            if at <= begin < end:
                found += [(self, at, begin), (detail.series, 0, len(detail.series))]
                at = end
        return [*found, (self, at, len(self))]

    # -- single values

    def exact(self, step: float) -> bool:
        """Return whether the last row up to a step is in memory as a single row."""
        return self._count(step) >= self.thin or any(
            self._in(detail, step) for detail in self.details
        )

    def at(self, column: str, step: float) -> float | None:
        """Return the value of a column at the last row up to `step`.

        None where there is no row, or where it is not in memory as a single row.
        """
        count = self._count(step)
        if count >= self.thin:
            return self._value(column, count)
        for detail in self.details:
            if self._in(detail, step):
                value = detail.series._value(column, detail.series._count(step))
                before = int(np.searchsorted(self.step, detail.low))
                sparse = column in self.bad and column not in SIGNALS
                elsewhere = value is None or (math.isnan(value) and sparse)
                if elsewhere:
                    return self._value(column, before)
                return value
        return None

    def last(self, column: str) -> float | None:
        """Return the newest value of a column: NaN for NaN and Inf, None where there is no row."""
        return self._value(column, len(self))

    def _count(self, step: float) -> int:
        """Return the number of points up to a step."""
        return int(np.searchsorted(self.step, step, side="right"))

    def _in(self, detail: Detail, step: float) -> bool:
        return (
            detail.low <= step <= detail.high and detail.series._count(step) >= detail.series.thin
        )

    def _value(self, column: str, end: int) -> float | None:
        """Return the value of the last of `end` points.

        A column that not all rows have (an evaluation) has its last known value.
        """
        values = self.values.get(column)
        if values is None or not end:
            return None
        value = float(values[end - 1])
        has_gaps = column in self.bad and column not in SIGNALS
        if math.isfinite(value) or not has_gaps or self.bad[column][end - 1]:
            return value
        while end:
            first = max(0, end - _SEARCHED)
            known = np.flatnonzero(np.isfinite(values[first:end]))
            if len(known):
                return float(values[first + known[-1]])
            end = first
        return None

    # -- other series made of it

    def copy(self) -> Series:
        """Return a copy without abandoned timelines, details and pyramids."""
        return Series(
            self.step.copy(),
            _copied(self.values),
            _copied(self.bad),
            axes=_copied(self.axes),
            thin=self.thin,
            low=_copied(self.low),
            high=_copied(self.high),
            row=self.row.copy(),
        )

    def summed_up(self, starts: np.ndarray) -> Series:
        """Return a series with one point for all points from one of `starts` to the next.

        The last point goes to the end.
        """
        last = np.append(starts[1:], len(self)) - 1
        values, low, high, bad = {}, {}, {}, {}
        for name, array in self.values.items():
            values[name] = array[last]
            if name not in self.bad:
                continue
            bad[name] = np.logical_or.reduceat(self.bad[name], starts)
            rows = array[self.thin :]
            lows = highs = rows
            if self.thin:
                lows = np.concatenate([self.low[name], rows])
                highs = np.concatenate([self.high[name], rows])
            low[name] = np.fmin.reduceat(lows, starts)
            high[name] = np.fmax.reduceat(highs, starts)
            if name not in SIGNALS:
                known = np.maximum.reduceat(
                    np.where(np.isfinite(array), np.arange(len(array)), -1), starts
                )
                values[name] = np.where(known >= 0, array[known], np.float32(np.nan))
        axes = {name: array[last] for name, array in self.axes.items()}
        return Series(
            self.step[last],
            values,
            bad,
            axes=axes,
            thin=len(last),
            low=low,
            high=high,
            row=self.row[last],
        )


def _copied(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in arrays.items()}


def choosable_signals(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the signals that rows with these columns have."""
    bands = ("_baseline", "_threshold")
    found = [name for name in columns if name not in _NO_SIGNALS and not name.endswith(bands)]
    if {"tokens", "step_time"} <= set(columns):
        found.append(THROUGHPUT)
    return tuple(found)
