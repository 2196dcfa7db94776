"""Metric rows as curves: the present one, and the abandoned stretches behind it.

A `Track` belongs to the reader's thread; the `Series` it hands out never change, though both share their memory: rows
are only ever written behind the end of every series handed out, and a rewind starts a new buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from guardrail.records import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.tui.raster import Curve

SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)
BANDS = tuple(f"{signal}_{part}" for signal in SIGNALS for part in ("baseline", "threshold"))
COLUMNS = ("step", "timeline", *SIGNALS, *BANDS)
_MAX_GHOSTS = 32  # newest abandoned stretches that are kept
_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Series:
    """One stretch of rows.

    Attributes:
        step: float64 [n], nondecreasing; a rejected attempt and the one that replaced it have the same step.
        values: float32 [n] a column; NaN where the row has none.
        bad: bool [n] a signal: the value was NaN or Inf.
        ghosts: abandoned stretches, oldest first.
    """

    step: np.ndarray = field(default_factory=lambda: np.zeros(0))
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    bad: Mapping[str, np.ndarray] = field(default_factory=dict)
    ghosts: tuple[Series, ...] = ()

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last_step(self) -> float:
        return float(self.step[-1]) if len(self.step) else 0.0

    @property
    def furthest(self) -> float:
        """The last step of the present or of any ghost: what the x-axis has to show."""
        return max([self.last_step, *(ghost.last_step for ghost in self.ghosts)])

    def curve(self, signal: str) -> Curve:
        if signal not in self.values:
            nothing = np.zeros(0)
            return Curve(nothing, nothing, nothing.astype(bool))
        y = self.values[signal]
        return Curve(self.step, y, self.bad[signal])

    def at(self, column: str, step: float) -> float | None:
        """The value of a column at the last row up to `step`; None where there is none."""
        values, row = self.values.get(column), int(np.searchsorted(self.step, step, side="right"))
        return float(values[row - 1]) if values is not None and row else None

    def last(self, column: str) -> float | None:
        """The newest value of a column: NaN for one that was NaN or Inf, None where there is no row."""
        values = self.values.get(column)
        return float(values[-1]) if values is not None and len(values) else None


class Track:
    """Grows by rows, goes back by `abandon`. Memory: 45 bytes a row."""

    def __init__(self) -> None:
        self._ghosts: tuple[Series, ...] = ()
        self._timeline = 0
        self._new_buffers(1024)
        self._rows = 0

    def _new_buffers(self, capacity: int) -> None:
        self._step = np.empty(capacity)
        self._values = {name: np.empty(capacity, dtype=np.float32) for name in (*SIGNALS, *BANDS)}
        self._bad = {name: np.empty(capacity, dtype=bool) for name in SIGNALS}

    def _arrays(self) -> list[np.ndarray]:
        return [self._step, *self._values.values(), *self._bad.values()]

    def _grow(self, rows: int, *, keep: int) -> None:
        """Fresh buffers for `rows` rows that begin with the first `keep` of the old ones."""
        old = self._arrays()
        self._new_buffers(max(1024, 1 << (rows - 1).bit_length()))
        for target, source in zip(self._arrays(), old, strict=True):
            target[:keep] = source[:keep]

    @property
    def timeline(self) -> int:
        """Of the newest row."""
        return int(self._timeline)

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
            if name not in where:
                target[here] = np.nan
                continue
            values = rows[:, where[name]]
            finite = np.isfinite(values)
            target[here] = np.where(finite, np.clip(values, -_FLOAT32, _FLOAT32), np.nan)
            if name in self._bad:
                self._bad[name][here] = ~finite if missing is None else ~(finite | missing[:, where[name]])
        for name, flags in self._bad.items():
            if name not in where:
                flags[here] = False
        self._rows = end

    def abandon(self, *, after: float) -> None:
        """A rollback or restart to step `after`: later rows become a ghost."""
        keep = int(np.searchsorted(self._step[: self._rows], after, side="right"))
        if keep == self._rows:
            return
        self._ghosts = (*self._ghosts, self._series(keep, self._rows))[-_MAX_GHOSTS:]
        self._grow(2 * keep, keep=keep)
        self._rows = keep

    def series(self) -> Series:
        series = self._series(0, self._rows)
        return Series(series.step, series.values, series.bad, self._ghosts)

    def _series(self, first: int, end: int) -> Series:
        return Series(
            _view(self._step, first, end),
            {name: _view(array, first, end) for name, array in self._values.items()},
            {name: _view(array, first, end) for name, array in self._bad.items()},
        )


def _view(array: np.ndarray, first: int, end: int) -> np.ndarray:
    view = array[first:end]
    view.flags.writeable = False
    return view
