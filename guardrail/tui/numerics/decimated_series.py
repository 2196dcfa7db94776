"""Rows in bounded memory: the newest are kept as they are, older ones are summed up.

A `DecimatedSeries` belongs to one thread. Each `Series` that it hands out never changes, though both
share memory. Rows are only written after the end of all series that were handed out, and a rollback
or a summing up starts a new buffer. Abandoned timelines are copied: a view of an old buffer would
keep all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from guardrail.core.records.verdicts import Action
from guardrail.tui.numerics.pyramid import BLOCK, Level, levels_above
from guardrail.tui.numerics.series import BANDS, SIGNALS, STEP, THROUGHPUT, TOKENS, Series

# about so many of the newest rows are kept as they are, and four times as many points of all rows
EXACT = 8192
_GROUP = 8  # rows that an old point stands for at first
_MAX_ABANDONED = 32  # newest abandoned timelines that are kept
_ABANDONED_POINTS = 2048  # ... and of each at most so many points
_APPLIED = list(Action).index(Action.APPLY)
_FLOAT32 = float(np.finfo(np.float32).max)

Again = Callable[[int, int], tuple[Sequence[str], np.ndarray]]


class DecimatedSeries:
    """Grows by `add`, and goes back by `abandon`.

    Memory: 55 bytes for each point, 5 more for each further signal, 8 for an axis. A point that
    sums up rows takes 8 more for each signal.

    Args:
        signals: what is kept besides SIGNALS, which are always kept.
        axes: of AXES, kept besides the steps.
        exact: about so many of the newest rows are kept as they are, at most twice as many; of all
            rows four times as many points. None: all rows are kept.
        again: returns rows [first, end) of the file once more, and their columns. A rollback into
            the middle of a point needs them; without `again`, the point is abandoned too.
        base: where the axes begin, for rows from the middle of a run.

    Attributes:
        cuts: how often something was abandoned.
        sums: how often rows were summed up.
    """

    def __init__(
        self,
        signals: Sequence[str] = (),
        axes: Sequence[str] = (),
        *,
        exact: int | None = None,
        again: Again | None = None,
        base: Mapping[str, float] | None = None,
    ) -> None:
        self._signals = tuple(dict.fromkeys((*SIGNALS, *signals)))
        self._axis_names = tuple(axis for axis in axes if axis != STEP)
        self._exact, self._again, self._base = exact, again, base or {}
        self._abandoned: tuple[Series, ...] = ()
        self._timeline = 0.0
        self._rows, self._seen = 0, 0  # points that are kept; rows of the file that were added
        self._group = _GROUP
        self._old = _old(Series())
        # changes when points that were handed out are no longer the first ones
        self._stem = object()
        self.cuts = 0
        self.sums = 0
        self._new_buffers(1024)

    def _new_buffers(self, capacity: int) -> None:
        self._step, self._row = np.empty(capacity), np.empty(capacity, np.int64)
        self._values = {
            name: np.empty(capacity, dtype=np.float32) for name in (*self._signals, *BANDS)
        }
        self._bad = {name: np.empty(capacity, dtype=bool) for name in self._signals}
        self._axes = {name: np.empty(capacity) for name in self._axis_names}
        blocks = capacity // BLOCK
        self._blocks = {
            name: Level(
                np.empty(blocks, np.float32), np.empty(blocks, np.float32), np.empty(blocks, bool)
            )
            for name in self._signals
        }

    def _arrays(self) -> list[np.ndarray]:
        return [
            self._step,
            self._row,
            *self._values.values(),
            *self._bad.values(),
            *self._axes.values(),
        ]

    def _refill(self, rows: int, *parts: Sequence[np.ndarray]) -> None:
        """Make new buffers for at least `rows` points, which begin with these arrays in turn."""
        self._new_buffers(max(1024, 1 << (rows - 1).bit_length()))
        at = 0
        for part in parts:
            for target, source in zip(self._arrays(), part, strict=True):
                target[at : at + len(source)] = source
            at += len(part[0])
        self._rows = at
        self._sum_up(0, (at - self._old.thin) // BLOCK)

    @property
    def timeline(self) -> int:
        """The timeline of the newest row."""
        return int(self._timeline)

    @property
    def last_step(self) -> float:
        return float(self._step[self._rows - 1]) if self._rows else 0.0

    def add(
        self,
        columns: Sequence[str],
        rows: np.ndarray,
        missing: np.ndarray | None = None,
        *,
        first: int | None = None,
    ) -> None:
        """Append rows in the order of the file.

        A new timeline, or a step that goes back, abandons the rows that it replaces.

        Args:
            columns: names of the columns of `rows`; unknown ones are skipped, missing ones are NaN.
            rows: float64 [n, len(columns)]. Rows without a step from 1 on are skipped: a power
                failure leaves zeros.
            missing: bool [n, len(columns)], cells that were not measured: no NaN to be marked.
            first: number of the first of them in the file; without it they follow those before.
        """
        numbers = np.arange(len(rows)) + (self._seen if first is None else first)
        if len(numbers):
            self._seen = int(numbers[-1]) + 1
        where = {name: index for index, name in enumerate(columns)}
        if "step" not in where or not len(rows):
            return
        step = rows[:, where["step"]]
        with np.errstate(invalid="ignore"):
            valid = (step >= 1) & (step < 2.0**53)
        if not valid.all():
            rows, numbers = rows[valid], numbers[valid]
            missing = None if missing is None else missing[valid]
            step = rows[:, where["step"]]
        if not len(rows):
            return
        timeline = np.zeros(len(rows))
        if "timeline" in where:
            timeline = rows[:, where["timeline"]]
        cuts = np.flatnonzero((np.diff(timeline) != 0) | (np.diff(step) < 0)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            goes_back = self._rows and step[start] < self._step[self._rows - 1]
            if timeline[start] != self._timeline or goes_back:
                self.abandon(after=float(step[start]) - 1)
                self._timeline = timeline[start]
            for at in range(start, end, self._exact or end):
                part = slice(at, min(end, at + (self._exact or end)))
                unmeasured = None if missing is None else missing[part]
                self._append(where, rows[part], unmeasured, numbers[part])

    def _append(
        self,
        where: dict[str, int],
        rows: np.ndarray,
        missing: np.ndarray | None,
        numbers: np.ndarray,
    ) -> None:
        self._make_room(len(rows))
        begin, end = self._rows, self._rows + len(rows)
        here = slice(begin, end)
        self._step[here], self._row[here] = rows[:, where["step"]], numbers
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
                # not all rows have it: a NaN may only mean that it was not measured
                self._bad[name][here] = np.isinf(values)
            elif missing is None:
                self._bad[name][here] = ~finite
            else:
                self._bad[name][here] = ~(finite | missing[:, where[name]])
        for name, flags in self._bad.items():
            if name not in where and name != THROUGHPUT:
                flags[here] = False
        for name, places in self._axes.items():
            before = float(places[begin - 1]) if begin else self._base.get(name, 0.0)
            places[here] = _places(where, rows, name, before)
        self._rows = end
        self._sum_up((begin - self._old.thin) // BLOCK, (end - self._old.thin) // BLOCK)

    def _make_room(self, rows: int) -> None:
        """Make room for so many more rows; sum up older ones where there are 2 x `exact` rows."""
        if self._exact is not None and self._rows - self._old.thin + rows > 2 * self._exact:
            self._thin_out(self._exact)
        if self._rows + rows > len(self._step):
            kept = [array[: self._rows] for array in self._arrays()]
            self._refill(max(self._rows + rows, 2 * len(self._step)), kept)

    def _thin_out(self, exact: int) -> None:
        """Sum up all but the newest `exact` rows.

        Where there are too many points of older rows, each two of them become one.
        """
        thin = self._old.thin
        many = -(-(self._rows - thin - exact) // self._group)
        if halve := thin + many > 2 * exact:
            self._group = min(2 * self._group, max(_GROUP, exact // 4))
            many = -(-(self._rows - thin - exact) // self._group)
        fold = many * self._group
        end = thin + fold
        starts = np.concatenate([np.arange(0, thin, 1 + halve), np.arange(thin, end, self._group)])
        old = self._series(0, end).summed_up(starts)
        rest = [array[end : self._rows] for array in self._arrays()]
        self._old, self._stem = _old(old), object()
        self.sums += 1
        self._refill(len(starts) + 2 * exact, _arrays_of(old), rest)

    def _sum_up(self, first: int, last: int) -> None:
        """Fill blocks [first, last) of the pyramid over the rows, which are complete now."""
        if first == last:
            return
        thin = self._old.thin
        rows = slice(thin + first * BLOCK, thin + last * BLOCK)
        for name, level in self._blocks.items():
            fresh = Level(
                self._values[name][rows], self._values[name][rows], self._bad[name][rows]
            ).folded()
            level.low[first:last], level.high[first:last], level.bad[first:last] = (
                fresh.low,
                fresh.high,
                fresh.bad,
            )

    def abandon(self, *, after: float) -> None:
        """Go back to step `after`: later rows become an abandoned timeline."""
        keep = int(np.searchsorted(self._step[: self._rows], after, side="right"))
        if keep == self._rows:
            return
        left, rescued = self._series(keep, self._rows), []
        if keep < self._old.thin and (part := self._read_again(keep)):
            count = int(np.searchsorted(part._step[: part._rows], after, side="right"))
            rescued.append([array[:count] for array in part._arrays()])
            left = _begun_with(part._series(count, part._rows), left)
        self._abandoned = (*self._abandoned, _shortened(left))[-_MAX_ABANDONED:]
        kept = [array[:keep] for array in self._arrays()]
        if keep < self._old.thin:
            self._old = _old(self._series(0, keep))
        self._refill(keep + 1024, kept, *rescued)
        self._stem = object()
        self.cuts += 1

    def _read_again(self, point: int) -> DecimatedSeries | None:
        """Read the rows that a point stands for; None where they cannot be read."""
        if self._again is None:
            return None
        first, base = 0, self._base
        if point:
            first = int(self._row[point - 1]) + 1
            base = {name: float(places[point - 1]) for name, places in self._axes.items()}
        part = DecimatedSeries(self._signals, self._axis_names, base=base)
        part.add(*self._again(first, int(self._row[point]) + 1), first=first)
        return part if part._rows else None

    def series(self) -> Series:
        blocks = (self._rows - self._old.thin) // BLOCK
        above = {
            name: levels_above(_first_blocks(level, blocks)) for name, level in self._blocks.items()
        }
        found = self._series(0, self._rows)
        return replace(
            found,
            abandoned=self._abandoned,
            above=above,
            low_above=self._old.low_above,
            stem=self._stem,
        )

    def _series(self, first: int, end: int) -> Series:
        thin = slice(first, min(end, self._old.thin))
        return Series(
            _view(self._step, first, end),
            {name: _view(array, first, end) for name, array in self._values.items()},
            {name: _view(array, first, end) for name, array in self._bad.items()},
            axes={name: _view(array, first, end) for name, array in self._axes.items()},
            thin=max(0, thin.stop - first),
            low={name: array[thin] for name, array in self._old.low.items()},
            high={name: array[thin] for name, array in self._old.high.items()},
            row=_view(self._row, first, end),
        )


def _first_blocks(level: Level, count: int) -> Level:
    return Level(
        _view(level.low, 0, count), _view(level.high, 0, count), _view(level.bad, 0, count)
    )


def _old(series: Series) -> Series:
    """Return a copy of what points that sum up rows have beyond rows, with a pyramid over them."""
    low = {name: array.copy() for name, array in series.low.items()}
    high = {name: array.copy() for name, array in series.high.items()}
    above = {
        name: levels_above(Level(low[name], high[name], series.bad[name]).folded()) for name in low
    }
    return Series(thin=series.thin, low=low, high=high, low_above=above)


def _arrays_of(series: Series) -> list[np.ndarray]:
    """Return its arrays in the order of `DecimatedSeries._arrays`."""
    return [
        series.step,
        series.row,
        *series.values.values(),
        *series.bad.values(),
        *series.axes.values(),
    ]


def _begun_with(rows: Series, series: Series) -> Series:
    """Return the series with a first point that stands for these rows only."""
    first, series = rows.summed_up(np.zeros(1, np.int64)), series.copy()
    for name in first.low:
        series.low[name][0], series.high[name][0] = first.low[name][0], first.high[name][0]
        series.bad[name][0] = first.bad[name][0]
    return series


def _shortened(series: Series) -> Series:
    """Return an abandoned timeline in at most 2,048 points."""
    stride = -(-len(series) // _ABANDONED_POINTS)
    if stride == 1:
        return series.copy()
    return series.summed_up(np.arange(0, len(series), stride))


def _column(where: Mapping[str, int], rows: np.ndarray, name: str) -> np.ndarray | None:
    """Return float64 [n]; None where the rows do not have the column."""
    if name in where:
        return np.asarray(rows[:, where[name]])
    if name == THROUGHPUT and {"tokens", "step_time"} <= where.keys():
        seconds = rows[:, where["step_time"]]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(seconds > 0, rows[:, where["tokens"]] / seconds, np.nan))
    return None


def _places(where: Mapping[str, int], rows: np.ndarray, axis: str, before: float) -> np.ndarray:
    """Return the places of rows after one at `before`: float64 [n], nondecreasing.

    Tokens of a rejected row do not count.
    """
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
