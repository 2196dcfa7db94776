"""The dot columns of a chart. Of a curve that only grows, only the last columns are computed again.

A run of a million steps has thousands of them in one dot column. The rows that come between two
frames change one or two columns.
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
    """Everything that a plot is drawn from. In a run of a million rows one more seldom changes it.

    Attributes:
        pale: abandoned timelines.
        places: of the smoothed line on the y-axis.
        rules: cell columns with a vertical line.
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
        """Return a key that is equal for plots that look the same.

        It holds bytes, since a NaN is not equal to itself.
        """
        parts: list[bytes | None] = []
        for one in (self.main, *self.pale):
            parts += [one.low.tobytes(), one.high.tobytes(), one.bad.tobytes()]
        for line in (self.baseline, self.threshold, self.places):
            parts.append(None if line is None else line.tobytes())
        return (*parts, self.rules, self.marks, self.log, self.scale, self.rows)


class ColumnCache:
    """The dot columns of one chart, which is drawn again and again."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        # number of points of the last series, and the place of the last one
        self._points, self._last = 0, 0.0
        self._dots: dict[str, np.ndarray] = {}
        self._abandoned: tuple[Series, ...] = ()
        self._abandoned_key: tuple[object, ...] = ()
        self._pale: tuple[Columns, ...] = ()
        self._marked: tuple[Mapping[str, object], Series | None] = ({}, None)
        self._mark_key: tuple[object, ...] = ()
        self._marks: tuple[Mark, ...] = ()

    def look(self, view: View, signal: str, scale: XScale, rows: int) -> PlotInput:
        """Return the input of a plot with so many rows of cells."""
        series, along = view.snapshot.series, axis.shown_axis(view)
        tall = rows > 1  # a curve of one row has no room for more than itself
        log, smooth = signal in view.logarithmic, view.smooth if tall else 0
        dots = self._columns(series, signal, along, scale, log=log, tall=tall, smooth=smooth > 0)
        places: np.ndarray | None = None
        rules: tuple[int, ...] = ()
        marks: tuple[Mark, ...] = ()
        if smooth:
            places = overlay.moving_average(dots["median"], SMOOTHING[smooth])
        if tall:
            rules = _rule_cells(view, scale)
            marks = self._marks_of(view, scale, all_kinds=view.big == signal)
        return PlotInput(
            main=Columns(dots["low"], dots["high"], dots["bad"]),
            pale=self._abandoned_columns(series, signal, along, scale),
            baseline=dots.get("baseline"),
            threshold=dots.get("threshold"),
            places=places,
            rules=rules,
            marks=marks,
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
        """Return name -> [C]; columns before the first one that may have changed are kept."""
        key = (series.stem, series.details, signal, along, scale, log, tall, smooth)
        grown = series.stem is not None and key == self._key and len(series) >= self._points > 0
        first = 0
        if grown:
            first = max(0, int(np.searchsorted(scale.edges(), self._last, side="right")) - 1)
        if not grown or (len(series) > self._points and first < scale.dots):
            fresh = _fresh(series, signal, along, scale, first, log=log, tall=tall, smooth=smooth)
            if first:
                fresh = {
                    name: np.concatenate([self._dots[name][:first], part])
                    for name, part in fresh.items()
                }
            self._dots = fresh
        self._key, self._points = key, len(series)
        self._last = float(series.along(along)[-1]) if len(series) else 0.0
        return self._dots

    def _abandoned_columns(
        self, series: Series, signal: str, along: str, scale: XScale
    ) -> tuple[Columns, ...]:
        key = (signal, along, scale)
        if key != self._abandoned_key or not _same(series.abandoned, self._abandoned):
            self._abandoned, self._abandoned_key = series.abandoned, key
            self._pale = tuple(
                raster.merged_dot_columns(one.curves(signal, along), scale)
                for one in series.abandoned
            )
        return self._pale

    def _marks_of(self, view: View, scale: XScale, *, all_kinds: bool) -> tuple[Mark, ...]:
        """Return the marks in view; on other axes than the steps, new rows may move them."""
        along, marks = axis.shown_axis(view), view.snapshot.story.marks
        sources = (marks, None if along == STEP else view.snapshot.series)
        key = (axis.checkpoint_steps(view), along, scale, all_kinds)
        if key != self._mark_key or not _same(sources, self._marked):
            self._marked, self._mark_key = sources, key
            self._marks = tuple(axis.marks_in_view(view, scale, all_kinds=all_kinds))
        return self._marks


def _rule_cells(view: View, scale: XScale) -> tuple[int, ...]:
    """Return the cell columns of the rollbacks and of the cursor."""
    steps = [step for step, _ in view.snapshot.story.marks.get(ROLLBACK, ())]
    if view.at is not None:
        steps.append(round(view.at))
    places = view.snapshot.series.places(np.array(steps, dtype=np.float64), axis.shown_axis(view))
    return tuple(map(scale.cell, places))


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
    """Compute the dot columns from `first` on."""
    curves = tuple(series.curves(signal, along))
    main = raster.merged_dot_columns(curves, scale, first)
    found = {"low": main.low, "high": main.high, "bad": main.bad}
    for part in ("baseline", "threshold"):
        if tall and f"{signal}_{part}" in series.values:
            found[part] = series.sampled(f"{signal}_{part}", along, scale, first)
    if smooth:
        found["median"] = overlay.column_medians(curves, scale, log, first)
    return found
