"""What the cells of a chart are made of: its dot columns. Of a curve that only grows the last ones
alone are computed.

A run of a million steps has thousands of them to a dot column: what comes between two frames
changes one column or two.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from guardrail.tui.chart import axis, overlay
from guardrail.tui.chart.overlay import Mark
from guardrail.tui.model.log_lines import ROLLBACK
from guardrail.tui.model.view import View
from guardrail.tui.numerics import raster
from guardrail.tui.numerics.raster import Columns
from guardrail.tui.numerics.scales import XScale
from guardrail.tui.numerics.series import STEP, Series

# Dot columns after which a value weighs half in the smoothed line.
SMOOTHING = (0.0, 2.0, 8.0)


class PlotInput(NamedTuple):
    """All that the cells of a plot are made of. A row more in a run of a million seldom changes any
    of it.
    """

    main: Columns
    pale: tuple[Columns, ...]
    baseline: np.ndarray | None
    threshold: np.ndarray | None
    places: np.ndarray | None
    rules: tuple[int, ...]
    marks: tuple[Mark, ...]
    log: bool
    scale: XScale
    rows: int

    def key(self) -> tuple[object, ...]:
        """Equal for what looks the same; bytes, since a NaN is not equal to itself."""
        curves = [
            part.tobytes()
            for one in (self.main, *self.pale)
            for part in (one.low, one.high, one.bad)
        ]
        lines = [
            None if part is None else part.tobytes()
            for part in (self.baseline, self.threshold, self.places)
        ]
        return (*curves, *lines, self.rules, self.marks, self.log, self.scale, self.rows)


class ColumnCache:
    """Looks at one signal again and again."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        # of the series that was looked at, and where its last one stood
        self._points, self._last = 0, 0.0
        self._dots: dict[str, np.ndarray] = {}
        self._ghosts: tuple[Series, ...] = ()
        self._ghost_key: tuple[object, ...] = ()
        self._pale: tuple[Columns, ...] = ()
        self._marked: tuple[Mapping[str, object], Series | None] = ({}, None)
        self._mark_key: tuple[object, ...] = ()
        self._marks: tuple[Mark, ...] = ()

    def look(self, view: View, signal: str, scale: XScale, rows: int) -> PlotInput:
        """At a plot of so many rows."""
        series, along = view.snapshot.series, axis.shown_axis(view)
        tall = rows > 1  # a curve of one row has no room for more than itself
        log, smooth = signal in view.logarithmic, view.smooth if tall else 0
        dots = self._columns(series, signal, along, scale, log=log, tall=tall, smooth=smooth > 0)
        rules = [step for step, _ in view.snapshot.story.marks.get(ROLLBACK, ())]
        rules += [round(view.at)] if view.at is not None else []
        return PlotInput(
            main=Columns(dots["low"], dots["high"], dots["bad"]),
            pale=self._abandoned(series, signal, along, scale),
            baseline=dots.get("baseline"),
            threshold=dots.get("threshold"),
            places=overlay.moving_average(dots["median"], SMOOTHING[smooth]) if smooth else None,
            rules=tuple(map(scale.cell, series.places(np.array(rules, dtype=np.float64), along)))
            if tall
            else (),
            marks=self._marks_of(view, scale, all_kinds=view.big == signal) if tall else (),
            log=log,
            scale=scale,
            rows=rows,
        )

    def _columns(
        self,
        series: Series,
        signal: str,
        along: str,
        scale: XScale,
        *,
        log: bool,
        tall: bool,
        smooth: bool,
    ) -> dict[str, np.ndarray]:
        """Name -> [C]; those of the last time, up to the column in which something may be new."""
        key = (series.stem, series.details, signal, along, scale, log, tall, smooth)
        grown = series.stem is not None and key == self._key and len(series) >= self._points > 0
        first = (
            max(0, int(np.searchsorted(scale.edges(), self._last, side="right")) - 1)
            if grown
            else 0
        )
        if not grown or (len(series) > self._points and first < scale.dots):
            fresh = _fresh(series, signal, along, scale, first, log=log, tall=tall, smooth=smooth)
            known = self._dots if first else {}
            self._dots = {
                name: np.concatenate([known[name][:first], part]) if first else part
                for name, part in fresh.items()
            }
        self._key, self._points = key, len(series)
        self._last = float(series.along(along)[-1]) if len(series) else 0.0
        return self._dots

    def _abandoned(
        self, series: Series, signal: str, along: str, scale: XScale
    ) -> tuple[Columns, ...]:
        key = (signal, along, scale)
        if key != self._ghost_key or not _same(series.abandoned, self._ghosts):
            self._ghosts, self._ghost_key = series.abandoned, key
            self._pale = tuple(
                raster.merged_dot_columns(ghost.curves(signal, along), scale)
                for ghost in series.abandoned
            )
        return self._pale

    def _marks_of(self, view: View, scale: XScale, *, all_kinds: bool) -> tuple[Mark, ...]:
        """Along steps they stand where they stand; along other axes the rows say where."""
        along, marks = axis.shown_axis(view), view.snapshot.story.marks
        sources = (marks, None if along == STEP else view.snapshot.series)
        key = (axis.checkpoint_steps(view), along, scale, all_kinds)
        if key != self._mark_key or not _same(sources, self._marked):
            self._marked, self._mark_key = sources, key
            self._marks = tuple(axis.marks_in_view(view, scale, all_kinds=all_kinds))
        return self._marks


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _fresh(
    series: Series,
    signal: str,
    along: str,
    scale: XScale,
    first: int,
    *,
    log: bool,
    tall: bool,
    smooth: bool,
) -> dict[str, np.ndarray]:
    """The dot columns from `first` on."""
    curves = tuple(series.curves(signal, along))
    main = raster.merged_dot_columns(curves, scale, first)
    found = {"low": main.low, "high": main.high, "bad": main.bad}
    for part in ("baseline", "threshold"):
        if tall and f"{signal}_{part}" in series.values:
            found[part] = series.sampled(f"{signal}_{part}", along, scale, first)
    if smooth:
        found["median"] = overlay.column_medians(curves, scale, log, first)
    return found
