"""The x-axis that all charts share: its range in view, its ticks, and the events marked on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from guardrail.core.format import format_count, format_elapsed, format_short_count
from guardrail.tui.chart.overlay import Mark
from guardrail.tui.draw.lines import Row
from guardrail.tui.model.log_lines import CHECKPOINT, COMMAND, INCIDENT, ROLLBACK, SKIP
from guardrail.tui.model.view import View
from guardrail.tui.numerics.raster import Ink
from guardrail.tui.numerics.scales import XScale, round_up
from guardrail.tui.numerics.series import STEP, TIME, TOKENS, Series

GUTTER = 8  # cells left of the plot: a label of at most seven and the axis
_LABEL_CELLS = 12  # distance of two labels of the x-axis, at least
_LEAST = {STEP: 50.0, TOKENS: 1.0, TIME: 10.0}  # the range that is shown at least
_SHORTEST = {STEP: 16.0, TOKENS: 16.0, TIME: 1.0}  # the range at which zooming in stops
# points that sum up rows, per dot column; with fewer of them their rows are read again
_POINTS = 4
_NEIGHBOURS = 1024.0  # steps read on each side of the cursor
_CLOCK = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)
# The order in which marks take their place: a later kind is dropped where an earlier one stands.
SEVERITY = (ROLLBACK, SKIP, INCIDENT, COMMAND, CHECKPOINT)
_INKS = {
    ROLLBACK: Ink.WARN,
    SKIP: Ink.WARN,
    INCIDENT: Ink.WARN,
    COMMAND: Ink.NEWS,
    CHECKPOINT: Ink.GOOD,
}


def shown_axis(view: View) -> str:
    """Return the chosen axis; the steps while the rows do not have it."""
    if view.axis in view.snapshot.series.axes:
        return view.axis
    return STEP


def axis_start(view: View) -> float:
    """Return where the axis begins: time counts from the first row."""
    series, axis = view.snapshot.series, shown_axis(view)
    if axis != TIME or not len(series):
        return 0.0
    return float(series.along(axis)[0])


def axis_end(view: View) -> float:
    """Return the last place of the complete run."""
    return view.snapshot.series.end(shown_axis(view))


def shortest_span(view: View) -> float:
    """Return the length of the shortest range that can be shown."""
    return _SHORTEST[shown_axis(view)]


def make_x_scale(view: View, cells: int) -> XScale:
    """Return the x-scale of all charts.

    It shows the range that the viewer chose, else everything up to the last step. The end of the
    run is shown too where that needs at most 25 % more. A range that follows the newest step moves
    by a tenth of itself at once.
    """
    axis, start, last = shown_axis(view), axis_start(view), axis_end(view)
    # Steps count from 1: half a step keeps the last step of a full axis on it.
    half = 0.5 if axis == STEP else 0.0
    if view.span is not None:
        dots = max(1, 2 * cells)
        per_dot = XScale.fit(view.span, dots, least=1.0).per_dot
        width = per_dot * dots
        grid = max(1.0, math.floor(width / 10))
        stop = last if view.end is None else view.end
        # Along steps the half step keeps the last one in view; on other axes it must lie before the
        # end.
        grids = (stop - start - width) / grid
        moved = math.ceil(grids) if axis == STEP else math.floor(grids) + 1
        first = start + max(0.0, moved * grid)
        return XScale(first + half, per_dot, dots)
    if view.status is not None and axis == STEP:
        total = float(view.status.total_steps)
        if last <= total <= last * 1.25:
            last = total
    fit = XScale.fit(last - start, 2 * cells, first=half, least=_LEAST[axis])
    return XScale(start + fit.first, fit.per_dot, fit.dots)


def ranges_to_read(view: View, scale: XScale) -> list[tuple[float, float]]:
    """Return the ranges of steps whose single rows are to be read.

    These are ranges in view that are summed up too coarsely, and the steps around the cursor.
    """
    series, axis, wanted = view.snapshot.series, shown_axis(view), []
    if not series.thin:
        return []
    low, high = (series.step_at(x, axis) for x in (scale.first, min(scale.last, axis_end(view))))
    high = min(high, float(series.step[series.thin - 1]))
    parts = [series]
    for detail in series.details:
        if detail.low <= low and high <= detail.high:
            parts.append(detail.series)
    if low < high and all(_coarse(part, low, high, scale, axis) for part in parts):
        margin = math.ceil((high - low) / 2)
        wanted.append((max(1.0, low - margin), high + margin))
    elif len(parts) > 1:
        wanted += [(detail.low, detail.high) for detail in series.details if detail.series in parts]
    if view.at is not None and not series.exact(view.at):
        wanted.append((max(1.0, view.at - _NEIGHBOURS), view.at + _NEIGHBOURS))
    return wanted


def _coarse(series: Series, low: float, high: float, scale: XScale, axis: str) -> bool:
    """Return whether [low, high] has fewer than four summed-up points per dot column."""
    first, last = (int(at) for at in np.searchsorted(series.step[: series.thin], (low, high)))
    places = series.along(axis)[max(0, first - 1) : last + 1]
    if len(places) < 2:
        return False
    return float(places[-1] - places[0]) * _POINTS > scale.per_dot * (len(places) - 1)


def axis_rows(view: View, scale: XScale, cells: int) -> list[Row]:
    """Return the x-axis with its ticks, and the labels below them."""
    return list(_axis_rows(scale, cells, shown_axis(view), axis_start(view)))


@lru_cache(maxsize=16)
def _axis_rows(scale: XScale, cells: int, axis: str, start: float) -> tuple[Row, Row]:
    line, labels = ["─"] * cells, [" "] * cells
    step = _stride(scale.per_dot * 2 * _LABEL_CELLS, axis)
    at = math.ceil((scale.first - start - 0.5 * (axis == STEP)) / step) * step
    while (cell := max(0, scale.cell(start + at))) < cells:
        line[cell] = "┬"
        text = format_tick(at, axis, wide=scale.last - start >= 1e6)
        first = min(max(0, cell - len(text) // 2), cells - len(text))
        if first >= 0 and set(labels[max(0, first - 1) : first + len(text) + 1]) == {" "}:
            labels[first : first + len(text)] = text
        at += step
    if axis != STEP:
        line[cells - len(axis) - 1 :] = f" {axis}"
    corner = " " * (GUTTER - 1)
    return ((f"{corner}└{''.join(line)}", "dim"),), ((f"{corner} {''.join(labels)}", "dim"),)


def _stride(least: float, axis: str) -> float:
    """Return the round distance of two ticks: a clock has its own round numbers."""
    if axis == TIME:
        for seconds in _CLOCK:
            if seconds >= least:
                return float(seconds)
        return 86400 * round_up(least / 86400)
    return round_up(least)


def format_tick(at: float, axis: str, *, wide: bool) -> str:
    if axis == TIME:
        return format_elapsed(at)
    if axis == TOKENS or wide:
        return format_short_count(at)
    return format_count(at)


# -- marks of events


def iterate_marks(view: View) -> Iterator[tuple[str, int, str]]:
    """Yield (letter, step, label) of all marks, kind by kind."""
    for letter in SEVERITY:
        for step, label in _marks_of_kind(view, letter):
            yield letter, step, label


def _marks_of_kind(view: View, letter: str) -> Sequence[tuple[int, str]]:
    """Return (step, label) of one kind."""
    if letter == CHECKPOINT:
        return [(step, "") for step in checkpoint_steps(view)]
    return view.snapshot.story.marks.get(letter, ())


def marks_in_view(view: View, scale: XScale, *, all_kinds: bool) -> list[Mark]:
    """Return the marks in view, at most one for each cell: the newest of the first kind.

    Args:
        all_kinds: also checkpoints and commands; else only rollbacks, skips and incidents.
    """
    found: dict[float, Mark] = {}
    for letter in SEVERITY:
        if letter in (COMMAND, CHECKPOINT) and not all_kinds:
            continue
        known = _marks_of_kind(view, letter)
        places = view.snapshot.series.places(
            np.array([step for step, _ in known], dtype=np.float64), shown_axis(view)
        )
        cells = np.floor((places - scale.first) / scale.per_dot) // 2
        in_view = np.flatnonzero((places >= scale.first) & (cells < scale.dots // 2))[::-1]
        taken, newest = np.unique(cells[in_view], return_index=True)
        for cell, index in zip(taken.tolist(), in_view[newest].tolist(), strict=True):
            found.setdefault(
                cell, Mark(float(places[index]), letter, known[index][1], _INKS[letter])
            )
    return sorted(found.values(), key=lambda mark: (SEVERITY.index(mark.letter), -mark.x))


def describe_marks_at(view: View, step: float) -> str:
    """Return the marks at a step in letters: "S2 C"."""
    marks = [f"{letter}{label}" for letter, at, label in iterate_marks(view) if at == round(step)]
    return " ".join(dict.fromkeys(marks))


def next_marked_step(view: View, step: float, by: int) -> int | None:
    """Return the nearest marked step after (`by` 1) or before (-1) a step."""
    steps = [at for _, at, _ in iterate_marks(view)]
    if by > 0:
        return min((at for at in steps if at > step), default=None)
    return max((at for at in steps if at < step), default=None)


def checkpoint_steps(view: View) -> tuple[int, ...]:
    """Return the steps of checkpoints that still exist; hundreds of deleted ones are no help."""
    if view.status is None:
        return ()
    return tuple(s.step for s in view.status.snapshots if s.tier == "disk")
