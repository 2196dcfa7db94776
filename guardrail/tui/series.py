"""Metric rows as curves: the present one, and the abandoned stretches behind it.

A `Track` belongs to the reader's thread; the `Series` it hands out never change, though both share their memory: rows
are only ever written behind the end of every series handed out, and a rewind starts a new buffer. Ghosts have memory of
their own: a view of an old buffer would keep all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from guardrail.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS, Action
from guardrail.tui.pyramid import BLOCK, Level, levels_above
from guardrail.tui.raster import Curve

SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)  # every row has them: one that is not finite was NaN or Inf
BANDS = tuple(f"{signal}_{part}" for signal in SIGNALS for part in ("baseline", "threshold"))
THROUGHPUT = "throughput"  # label tokens a second, of two columns
STEP, TOKENS, TIME = "step", "tokens", "time"
AXES = (STEP, TOKENS, TIME)
_NO_SIGNALS = frozenset(("step", "timeline", "time", "first", "last", "verdict", "tokens", "slowest_rank"))
_MAX_GHOSTS = 32  # newest abandoned stretches that are kept
_FAR = 4096  # rows looked at at once for the last value of what not every row has
_APPLIED = list(Action).index(Action.APPLY)
_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Series:
    """One stretch of rows.

    Attributes:
        step: float64 [n], nondecreasing; a rejected attempt and the one that replaced it have the same step.
        values: float32 [n] a column; NaN where the row has none.
        bad: bool [n] a signal: the value was NaN or Inf.
        ghosts: abandoned stretches, oldest first.
        axes: float64 [n], nondecreasing, what else the rows can stand along: tokens learnt from, seconds of the clock.
        above: levels of a pyramid over the values of a signal.
    """

    step: np.ndarray = field(default_factory=lambda: np.zeros(0))
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    bad: Mapping[str, np.ndarray] = field(default_factory=dict)
    ghosts: tuple[Series, ...] = ()
    axes: Mapping[str, np.ndarray] = field(default_factory=dict)
    above: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last_step(self) -> float:
        return float(self.step[-1]) if len(self.step) else 0.0

    def along(self, axis: str) -> np.ndarray:
        """float64 [n]: where the rows stand; along their steps where the axis is not known."""
        return self.axes.get(axis, self.step)

    def end(self, axis: str) -> float:
        """The end of the present or of any ghost: what the x-axis has to show."""
        ends = [one.along(axis)[-1] for one in (self, *self.ghosts) if len(one)]
        return float(max(ends, default=0.0))

    def place(self, step: float, axis: str) -> float:
        """Where a step stands on an axis: at the last row up to it."""
        return float(self.places(np.array([step]), axis)[0])

    def places(self, steps: np.ndarray, axis: str) -> np.ndarray:
        """`place` of many steps, float64 [n]."""
        if axis not in self.axes or not len(self):
            return steps
        rows = np.searchsorted(self.step, steps, side="right")
        return np.asarray(self.axes[axis][np.maximum(0, rows - 1)])

    def step_at(self, x: float, axis: str) -> float:
        """The step of the last row up to a place on an axis."""
        if axis not in self.axes or not len(self):
            return x
        row = int(np.searchsorted(self.axes[axis], x, side="right"))
        return float(self.step[max(0, row - 1)])

    def curve(self, signal: str, axis: str = STEP) -> Curve:
        if signal not in self.values:
            nothing = np.zeros(0)
            return Curve(nothing, nothing, nothing.astype(bool))
        return Curve(self.along(axis), self.values[signal], self.bad[signal], self.above.get(signal, ()))

    def copy(self) -> Series:
        """The same in memory of its own, without ghosts."""
        return Series(
            self.step.copy(),
            {name: array.copy() for name, array in self.values.items()},
            {name: array.copy() for name, array in self.bad.items()},
            axes={name: array.copy() for name, array in self.axes.items()},
        )

    def at(self, column: str, step: float) -> float | None:
        """The value of a column at the last row up to `step`; None where there is none."""
        return self._value(column, int(np.searchsorted(self.step, step, side="right")))

    def last(self, column: str) -> float | None:
        """The newest value of a column: NaN for one that was NaN or Inf, None where there is no row."""
        return self._value(column, len(self))

    def _value(self, column: str, end: int) -> float | None:
        """Of the last of `end` rows; a column that not every row has (an evaluation) has its last one."""
        values = self.values.get(column)
        if values is None or not end:
            return None
        value = float(values[end - 1])
        if math.isfinite(value) or column not in self.bad or column in SIGNALS or self.bad[column][end - 1]:
            return value
        while end:
            first = max(0, end - _FAR)
            known = np.flatnonzero(np.isfinite(values[first:end]))
            if len(known):
                return float(values[first + known[-1]])
            end = first
        return None


def choosable(columns: Sequence[str]) -> tuple[str, ...]:
    """Which signals rows with these columns have."""
    bands = ("_baseline", "_threshold")
    found = [name for name in columns if name not in _NO_SIGNALS and not name.endswith(bands)]
    made = [THROUGHPUT] if {"tokens", "step_time"} <= set(columns) else []
    return (*found, *made)


class Track:
    """Grows by rows, goes back by `abandon`. Memory: 47 bytes a row, 5 more for each further signal, 8 for an axis.

    Args:
        signals: what is kept besides SIGNALS, which are always.
        axes: of AXES, kept besides the steps.
    """

    def __init__(self, signals: Sequence[str] = (), axes: Sequence[str] = ()) -> None:
        self._signals = tuple(dict.fromkeys((*SIGNALS, *signals)))
        self._axis_names = tuple(axis for axis in axes if axis != STEP)
        self._ghosts: tuple[Series, ...] = ()
        self._timeline = 0
        self._new_buffers(1024)
        self._rows = 0

    def _new_buffers(self, capacity: int) -> None:
        self._step = np.empty(capacity)
        self._values = {name: np.empty(capacity, dtype=np.float32) for name in (*self._signals, *BANDS)}
        self._bad = {name: np.empty(capacity, dtype=bool) for name in self._signals}
        self._axes = {name: np.empty(capacity) for name in self._axis_names}
        blocks = capacity // BLOCK
        self._blocks = {
            name: Level(np.empty(blocks, np.float32), np.empty(blocks, np.float32), np.empty(blocks, bool))
            for name in self._signals
        }

    def _arrays(self) -> list[np.ndarray]:
        return [self._step, *self._values.values(), *self._bad.values(), *self._axes.values()]

    def _summaries(self) -> list[np.ndarray]:
        return [part for level in self._blocks.values() for part in (level.low, level.high, level.bad)]

    def _grow(self, rows: int, *, keep: int) -> None:
        """Fresh buffers for `rows` rows that begin with the first `keep` of the old ones."""
        old, summed_up = self._arrays(), self._summaries()
        self._new_buffers(max(1024, 1 << (rows - 1).bit_length()))
        for target, source in zip(self._arrays(), old, strict=True):
            target[:keep] = source[:keep]
        for target, source in zip(self._summaries(), summed_up, strict=True):
            target[: keep // BLOCK] = source[: keep // BLOCK]

    @property
    def timeline(self) -> int:
        """Of the newest row."""
        return int(self._timeline)

    @property
    def last_step(self) -> float:
        return float(self._step[self._rows - 1]) if self._rows else 0.0

    def add(self, columns: Sequence[str], rows: np.ndarray, missing: np.ndarray | None = None) -> None:
        """Append rows in the order of the file.

        Args:
            columns: names of the columns of `rows`; unknown ones are passed over, missing ones are NaN.
            rows: float64 [n, len(columns)]. A row whose step is no number from 1 on (the zeros that a power failure
                leaves) is none. A new timeline, or a step that goes back, abandons what it replaces.
            missing: bool [n, len(columns)] cells that nobody measured: no NaN that is worth a mark.
        """
        where = {name: index for index, name in enumerate(columns)}
        if "step" not in where or not len(rows):
            return
        step = rows[:, where["step"]]
        with np.errstate(invalid="ignore"):
            valid = (step >= 1) & (step < 2.0**53)
        if not valid.all():
            rows, missing = rows[valid], missing[valid] if missing is not None else None
            step = rows[:, where["step"]]
        if not len(rows):
            return
        timeline = rows[:, where["timeline"]] if "timeline" in where else np.zeros(len(rows))
        cuts = np.flatnonzero((np.diff(timeline) != 0) | (np.diff(step) < 0)) + 1
        for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            goes_back = self._rows and step[first] < self._step[self._rows - 1]
            if timeline[first] != self._timeline or goes_back:
                self.abandon(after=float(step[first]) - 1)
                self._timeline = timeline[first]
            self._append(where, rows[first:end], missing[first:end] if missing is not None else None)

    def _append(self, where: dict[str, int], rows: np.ndarray, missing: np.ndarray | None) -> None:
        end = self._rows + len(rows)
        if end > len(self._step):
            self._grow(max(end, 2 * len(self._step)), keep=self._rows)
        here = slice(self._rows, end)
        self._step[here] = rows[:, where["step"]]
        for name, target in self._values.items():
            values = _column(where, rows, name)
            if values is None:
                target[here] = np.nan
                continue
            finite = np.isfinite(values)
            target[here] = np.where(finite, np.clip(values, -_FLOAT32, _FLOAT32), np.nan)
            if name not in self._bad:
                continue
            if name not in SIGNALS:
                self._bad[name][here] = np.isinf(values)  # not every row has it: a NaN may be nothing at all
            else:
                self._bad[name][here] = ~finite if missing is None else ~(finite | missing[:, where[name]])
        for name, flags in self._bad.items():
            if name not in where and name != THROUGHPUT:
                flags[here] = False
        for name, places in self._axes.items():
            before = float(places[self._rows - 1]) if self._rows else 0.0
            places[here] = _places(where, rows, name, before)
        self._sum_up(self._rows // BLOCK, end // BLOCK)
        self._rows = end

    def _sum_up(self, first: int, last: int) -> None:
        """Blocks [first, last) of the pyramid have become complete."""
        if first == last:
            return
        rows = slice(first * BLOCK, last * BLOCK)
        for name, level in self._blocks.items():
            fresh = Level(self._values[name][rows], self._values[name][rows], self._bad[name][rows]).folded()
            level.low[first:last], level.high[first:last], level.bad[first:last] = fresh.low, fresh.high, fresh.bad

    def abandon(self, *, after: float) -> None:
        """A rollback or restart to step `after`: later rows become a ghost."""
        keep = int(np.searchsorted(self._step[: self._rows], after, side="right"))
        if keep == self._rows:
            return
        self._ghosts = (*self._ghosts, self._series(keep, self._rows).copy())[-_MAX_GHOSTS:]
        self._grow(2 * keep, keep=keep)
        self._rows = keep

    def series(self) -> Series:
        series = self._series(0, self._rows)
        blocks = self._rows // BLOCK
        above = {
            name: levels_above(Level(*(_view(part, 0, blocks) for part in (level.low, level.high, level.bad))))
            for name, level in self._blocks.items()
        }
        return replace(series, ghosts=self._ghosts, above=above)

    def _series(self, first: int, end: int) -> Series:
        return Series(
            _view(self._step, first, end),
            {name: _view(array, first, end) for name, array in self._values.items()},
            {name: _view(array, first, end) for name, array in self._bad.items()},
            axes={name: _view(array, first, end) for name, array in self._axes.items()},
        )


def _column(where: Mapping[str, int], rows: np.ndarray, name: str) -> np.ndarray | None:
    """float64 [n], or None where the rows do not have it."""
    if name in where:
        return np.asarray(rows[:, where[name]])
    if name == THROUGHPUT and {"tokens", "step_time"} <= where.keys():
        seconds = rows[:, where["step_time"]]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(seconds > 0, rows[:, where["tokens"]] / seconds, np.nan))
    return None


def _places(where: Mapping[str, int], rows: np.ndarray, axis: str, before: float) -> np.ndarray:
    """float64 [n], nondecreasing: where rows stand that follow one at `before`. A rejected row learns from no token."""
    if axis not in where:
        return np.full(len(rows), before)
    values = np.nan_to_num(rows[:, where[axis]], nan=0.0, posinf=0.0, neginf=0.0)
    if axis == TOKENS:
        if "verdict" in where:
            values = np.where(rows[:, where["verdict"]] == _APPLIED, values, 0.0)
        return before + np.cumsum(np.maximum(values, 0.0))
    return np.maximum.accumulate(np.maximum(values, before))  # a clock may be set back


def _view(array: np.ndarray, first: int, end: int) -> np.ndarray:
    view = array[first:end]
    view.flags.writeable = False
    return view
