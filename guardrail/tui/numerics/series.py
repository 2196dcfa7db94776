"""Metric rows as curves: the present one, and the abandoned stretches behind it. What is handed out
never changes.

Of a long run the rows that are far back are summed up: a point stands for several of them in a row,
with the least and the greatest value, so that no spike is lost. Where the viewer looks closer their
rows are read again: a `Detail`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from guardrail.core.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.tui.numerics.pyramid import Level
from guardrail.tui.numerics.raster import Curve, sample_last
from guardrail.tui.numerics.scales import XScale

# every row has them: one that is not finite was NaN or Inf
SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)
BANDS = tuple(f"{signal}_{part}" for signal in SIGNALS for part in ("baseline", "threshold"))
THROUGHPUT = "throughput"  # label tokens a second, of two columns
STEP, TOKENS, TIME = "step", "tokens", "time"
AXES = (STEP, TOKENS, TIME)
_NO_SIGNALS = frozenset(
    ("step", "timeline", "time", "first", "last", "verdict", "tokens", "slowest_rank")
)
_FAR = 4096  # points looked at at once for the last value of what not every row has


class Detail(NamedTuple):
    """Rows that were read again: all of the present with steps in [low, high], rows [first, end) of
    the file.
    """

    series: Series
    first: int
    end: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Series:
    """One stretch of rows as points: the first `thin` stand for several rows each, the others are
    rows.

    Attributes:
        step: float64 [n], nondecreasing, of a point's last row; a rejected attempt and the one that
            replaced it have the same step.
        values: float32 [n] a column: of a point's last row, or the last known one for what not
            every row has. NaN where there is none.
        bad: bool [n] a signal: a value was NaN or Inf.
        ghosts: abandoned stretches, oldest first.
        axes: float64 [n], nondecreasing, what else the rows can stand along: tokens learnt from,
        seconds of the clock.
        above: levels of a pyramid over the rows from `thin` on, a signal.
        low, high: float32 [thin] a signal: least and greatest value; NaN where there is none.
        low_above: levels of a pyramid over the points before.
        row: int64 [n], the number in the file of a point's last row.
        details: stretches of what is summed up, in rows.
        stem: two series with the same one begin with the same points; None: nothing is known of
        that.
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
        """float64 [n]: where the points stand; along their steps where the axis is not known."""
        return self.axes.get(axis, self.step)

    def end(self, axis: str) -> float:
        """The end of the present or of any ghost: what the x-axis has to show."""
        ends = [one.along(axis)[-1] for one in (self, *self.abandoned) if len(one)]
        return float(max(ends, default=0.0))

    def place(self, step: float, axis: str) -> float:
        """Where a step stands on an axis: at the last row up to it."""
        return float(self.places(np.array([step]), axis)[0])

    def places(self, steps: np.ndarray, axis: str) -> np.ndarray:
        """`place` of many steps, float64 [n]."""
        if axis not in self.axes or not len(self):
            return steps
        rows = np.searchsorted(self.step, steps, side="right")
        found = np.asarray(self.axes[axis][np.maximum(0, rows - 1)])
        for detail in self.details:
            closer = (steps >= detail.series.step[0]) & (steps <= detail.high)
            found[closer] = detail.series.places(steps[closer], axis)
        return found

    def step_at(self, x: float, axis: str) -> float:
        """The step of the last row up to a place on an axis."""
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
        """The points of a signal in as many curves as lie behind each other; closer ones in place
        of coarse ones.
        """
        for part, first, end in self._parts:
            if signal in part.values and signal in part.bad:
                yield from part._own_curves(signal, axis, first, end)

    def _own_curves(self, signal: str, axis: str, first: int, end: int) -> Iterator[Curve]:
        """Points [first, end): those that sum up rows, and rows."""
        x, y, bad, thin = self.along(axis), self.values[signal], self.bad[signal], self.thin
        if first < thin:
            yield Curve(x[:thin], y[:thin], bad[:thin], self.low_above.get(signal, ()), self.low[signal],
                        self.high[signal], first=first, end=min(end, thin))  # fmt: skip
        if end > thin or not thin:
            yield Curve(x[thin:], y[thin:], bad[thin:], self.above.get(signal, ()), first=max(0, first - thin),
                        end=end - thin)  # fmt: skip

    def sampled(self, column: str, axis: str, scale: XScale, first_dot: int = 0) -> np.ndarray:
        """The last value of a column in each dot column, float64 [C - first_dot], NaN where there
        is none.
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
        """(series, first point, end) one behind the other: no row is in none of them."""
        found: list[tuple[Series, int, int]] = []
        at = 0
        for detail in sorted(self.details, key=lambda one: one.first):
            # A point is replaced if all of its rows are in the detail: it begins behind the last
            # row of the one before.
            begin = int(np.searchsorted(self.row, detail.first - 1)) + 1 if detail.first else 0
            end = int(np.searchsorted(self.row, detail.end))
            if at <= begin < end:
                found += [(self, at, begin), (detail.series, 0, len(detail.series))]
                at = end
        return [*found, (self, at, len(self))]

    # -- single values

    def exact(self, step: float) -> bool:
        """Whether the last row up to a step is at hand, and not only a sum of it and others."""
        return self._count(step) >= self.thin or any(
            self._in(detail, step) for detail in self.details
        )

    def at(self, column: str, step: float) -> float | None:
        """The value of a column at the last row up to `step`; None where there is none, or where it
        is not at hand.
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
                return self._value(column, before) if elsewhere else value
        return None

    def last(self, column: str) -> float | None:
        """The newest value of a column: NaN for one that was NaN or Inf, None where there is no
        row.
        """
        return self._value(column, len(self))

    def _count(self, step: float) -> int:
        """Points up to a step."""
        return int(np.searchsorted(self.step, step, side="right"))

    def _in(self, detail: Detail, step: float) -> bool:
        return (
            detail.low <= step <= detail.high and detail.series._count(step) >= detail.series.thin
        )

    def _value(self, column: str, end: int) -> float | None:
        """Of the last of `end` points; a column that not every row has (an evaluation) has its last
        one.
        """
        values = self.values.get(column)
        if values is None or not end:
            return None
        value = float(values[end - 1])
        if (
            math.isfinite(value)
            or column not in self.bad
            or column in SIGNALS
            or self.bad[column][end - 1]
        ):
            return value
        while end:
            first = max(0, end - _FAR)
            known = np.flatnonzero(np.isfinite(values[first:end]))
            if len(known):
                return float(values[first + known[-1]])
            end = first
        return None

    # -- making others of it

    def copy(self) -> Series:
        """The same in memory of its own, without ghosts, details and pyramids."""
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
        """A point for all points from one of `starts` to the next, the last one's to the end; none
        of it is rows.
        """
        last = np.append(starts[1:], len(self)) - 1
        values, low, high, bad = {}, {}, {}, {}
        for name, array in self.values.items():
            values[name] = array[last]
            if name not in self.bad:
                continue
            bad[name] = np.logical_or.reduceat(self.bad[name], starts)
            rows = array[self.thin :]
            low[name] = np.fmin.reduceat(
                np.concatenate([self.low[name], rows]) if self.thin else rows, starts
            )
            high[name] = np.fmax.reduceat(
                np.concatenate([self.high[name], rows]) if self.thin else rows, starts
            )
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
    """Which signals rows with these columns have."""
    bands = ("_baseline", "_threshold")
    found = [name for name in columns if name not in _NO_SIGNALS and not name.endswith(bands)]
    made = [THROUGHPUT] if {"tokens", "step_time"} <= set(columns) else []
    return (*found, *made)
