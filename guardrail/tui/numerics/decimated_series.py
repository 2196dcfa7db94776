"""Rows as they come, and what is kept of them: the newest as they are, older ones summed up, in
bounded memory.

A `Track` belongs to one thread; the `Series` it hands out never change, though both share their
memory: rows are only ever written behind the end of every series handed out, and a rewind or a
summing up starts a new buffer. Ghosts have memory of their own: a view of an old buffer would keep
all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from guardrail.core.records import Action
from guardrail.tui.numerics.pyramid import BLOCK, Level, levels_above
from guardrail.tui.numerics.series import BANDS, SIGNALS, STEP, THROUGHPUT, TOKENS, Series

# newest rows of a run that are kept as they are, about; four times as many points are kept of all
EXACT = 8192
_GROUP = 8  # rows that an old point stands for at first
_MAX_GHOSTS = 32  # newest abandoned stretches that are kept
_GHOST_POINTS = 2048  # ... and of each at most so many points
_APPLIED = list(Action).index(Action.APPLY)
_FLOAT32 = float(np.finfo(np.float32).max)

Again = Callable[[int, int], tuple[Sequence[str], np.ndarray]]


class DecimatedSeries:
    """Grows by rows, goes back by `abandon`.

    Memory: 55 bytes a point, 5 more for each further signal, 8 for an axis; of what is summed up 8
    more a signal.

    Args:
        signals: what is kept besides SIGNALS, which are always.
        axes: of AXES, kept besides the steps.
        exact: about so many of the newest rows stay, at most twice as many, and of all four times
        as many points; None:
            all of them stay.
        again: rows [first, end) of the file once more, and their columns: what a return into the
            middle of a point needs. Without, the point leaves with what is abandoned.
        base: where the axes begin, for rows from the middle of a run.
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
        self._ghosts: tuple[Series, ...] = ()
        self._timeline = 0.0
        self._rows, self._seen = 0, 0  # points that are kept; rows of the file that were added
        self._group = _GROUP
        self._old = _old(Series())
        # another one once points that were handed out are no longer the first ones
        self._stem = object()
        self.cuts = 0  # times that something was abandoned
        self.sums = 0  # times that something was summed up
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
        """Fresh buffers, for `rows` points at least, that begin with these arrays, one behind the
        other.
        """
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
        """Of the newest row."""
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

        Args:
            columns: names of the columns of `rows`; unknown ones are passed over, missing ones are
            NaN.
            rows: float64 [n, len(columns)]. A row whose step is no number from 1 on (the zeros that
                a power failure leaves) is none. A new timeline, or a step that goes back, abandons
                what it replaces.
            missing: bool [n, len(columns)] cells that nobody measured: no NaN that is worth a mark.
            first: number of the first of them in the file; without, they follow the ones before.
        """
        numbers = np.arange(len(rows)) + (self._seen if first is None else first)
        self._seen = int(numbers[-1]) + 1 if len(numbers) else self._seen
        where = {name: index for index, name in enumerate(columns)}
        if "step" not in where or not len(rows):
            return
        step = rows[:, where["step"]]
        with np.errstate(invalid="ignore"):
            valid = (step >= 1) & (step < 2.0**53)
        if not valid.all():
            rows, missing, numbers = (
                rows[valid],
                missing[valid] if missing is not None else None,
                numbers[valid],
            )
            step = rows[:, where["step"]]
        if not len(rows):
            return
        timeline = rows[:, where["timeline"]] if "timeline" in where else np.zeros(len(rows))
        cuts = np.flatnonzero((np.diff(timeline) != 0) | (np.diff(step) < 0)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            goes_back = self._rows and step[start] < self._step[self._rows - 1]
            if timeline[start] != self._timeline or goes_back:
                self.abandon(after=float(step[start]) - 1)
                self._timeline = timeline[start]
            for at in range(start, end, self._exact or end):
                part = slice(at, min(end, at + (self._exact or end)))
                self._append(
                    where, rows[part], missing[part] if missing is not None else None, numbers[part]
                )

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
                # not every row has it: a NaN may be nothing at all
                self._bad[name][here] = np.isinf(values)
            else:
                self._bad[name][here] = (
                    ~finite if missing is None else ~(finite | missing[:, where[name]])
                )
        for name, flags in self._bad.items():
            if name not in where and name != THROUGHPUT:
                flags[here] = False
        for name, places in self._axes.items():
            before = float(places[begin - 1]) if begin else self._base.get(name, 0.0)
            places[here] = _places(where, rows, name, before)
        self._rows = end
        self._sum_up((begin - self._old.thin) // BLOCK, (end - self._old.thin) // BLOCK)

    def _make_room(self, rows: int) -> None:
        """For so many rows more; of more than twice `exact` rows the older ones are summed up."""
        if self._exact is not None and self._rows - self._old.thin + rows > 2 * self._exact:
            self._thin_out(self._exact)
        if self._rows + rows > len(self._step):
            kept = [array[: self._rows] for array in self._arrays()]
            self._refill(max(self._rows + rows, 2 * len(self._step)), kept)

    def _thin_out(self, exact: int) -> None:
        """Sum up all but the newest `exact` rows; old points become half as many where they are too
        many.
        """
        thin = self._old.thin
        many = -(-(self._rows - thin - exact) // self._group)
        if halve := thin + many > 2 * exact:
            self._group = min(2 * self._group, max(_GROUP, exact // 4))
            many = -(-(self._rows - thin - exact) // self._group)
        fold = many * self._group
        end = thin + fold
        starts = np.concatenate([np.arange(0, thin, 1 + halve), np.arange(thin, end, self._group)])
        old, rest = (
            self._series(0, end).summed_up(starts),
            [array[end : self._rows] for array in self._arrays()],
        )
        self._old, self._stem = _old(old), object()
        self.sums += 1
        self._refill(len(starts) + 2 * exact, _arrays_of(old), rest)

    def _sum_up(self, first: int, last: int) -> None:
        """Blocks [first, last) of the pyramid over the rows have become complete."""
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
        """A rollback or restart to step `after`: later rows become a ghost."""
        keep = int(np.searchsorted(self._step[: self._rows], after, side="right"))
        if keep == self._rows:
            return
        left, rescued = self._series(keep, self._rows), []
        if keep < self._old.thin and (part := self._read_again(keep)):
            count = int(np.searchsorted(part._step[: part._rows], after, side="right"))
            rescued.append([array[:count] for array in part._arrays()])
            left = _begun_with(part._series(count, part._rows), left)
        self._ghosts = (*self._ghosts, _ghost(left))[-_MAX_GHOSTS:]
        kept = [array[:keep] for array in self._arrays()]
        if keep < self._old.thin:
            self._old = _old(self._series(0, keep))
        self._refill(keep + 1024, kept, *rescued)
        self._stem = object()
        self.cuts += 1

    def _read_again(self, point: int) -> DecimatedSeries | None:
        """The rows that a point stands for."""
        if self._again is None:
            return None
        first = int(self._row[point - 1]) + 1 if point else 0
        base = (
            {name: float(places[point - 1]) for name, places in self._axes.items()}
            if point
            else self._base
        )
        part = DecimatedSeries(self._signals, self._axis_names, base=base)
        part.add(*self._again(first, int(self._row[point]) + 1), first=first)
        return part if part._rows else None

    def series(self) -> Series:
        blocks = (self._rows - self._old.thin) // BLOCK
        above = {
            name: levels_above(
                Level(*(_view(part, 0, blocks) for part in (level.low, level.high, level.bad)))
            )
            for name, level in self._blocks.items()
        }
        found = self._series(0, self._rows)
        return replace(
            found,
            abandoned=self._ghosts,
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


def _old(series: Series) -> Series:
    """What points that sum up rows have beyond rows, with a pyramid over them, in memory of its
    own.
    """
    low, high = (
        {name: array.copy() for name, array in part.items()} for part in (series.low, series.high)
    )
    above = {
        name: levels_above(Level(low[name], high[name], series.bad[name]).folded()) for name in low
    }
    return Series(thin=series.thin, low=low, high=high, low_above=above)


def _arrays_of(series: Series) -> list[np.ndarray]:
    """In the order of `Track._arrays`."""
    return [
        series.step,
        series.row,
        *series.values.values(),
        *series.bad.values(),
        *series.axes.values(),
    ]


def _begun_with(rows: Series, series: Series) -> Series:
    """The series with a first point that stands for these rows alone."""
    first, series = rows.summed_up(np.zeros(1, np.int64)), series.copy()
    for name in first.low:
        series.low[name][0], series.high[name][0] = first.low[name][0], first.high[name][0]
        series.bad[name][0] = first.bad[name][0]
    return series


def _ghost(series: Series) -> Series:
    stride = -(-len(series) // _GHOST_POINTS)
    return series.copy() if stride == 1 else series.summed_up(np.arange(0, len(series), stride))


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
    """float64 [n], nondecreasing: where rows stand that follow one at `before`. A rejected row
    learns from no token.
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
