"""The x-axis that all charts share: what it runs along, which stretch is in sight, its ticks, and
what stands on it.
"""

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
_LEAST = {STEP: 50.0, TOKENS: 1.0, TIME: 10.0}  # the stretch that is shown at least
_NEAREST = {STEP: 16.0, TOKENS: 16.0, TIME: 1.0}  # and what zooming stops at
_POINTS = 4  # that sum up rows, a dot column at least; closer they are read again
_NEIGHBOURS = 1024.0  # steps read around the value cursor
_CLOCK = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)
# A mark that finds no place because of another gives way to the graver one.
SEVERITY = (ROLLBACK, SKIP, INCIDENT, COMMAND, CHECKPOINT)
_INKS = {
    ROLLBACK: Ink.WARN,
    SKIP: Ink.WARN,
    INCIDENT: Ink.WARN,
    COMMAND: Ink.NEWS,
    CHECKPOINT: Ink.GOOD,
}


def shown_axis(view: View) -> str:
    """The axis that was chosen, once the rows know it."""
    return view.axis if view.axis in view.snapshot.series.axes else STEP


def axis_start(view: View) -> float:
    """Where the axis begins: time stamps count from the first row."""
    series, axis = view.snapshot.series, shown_axis(view)
    return float(series.along(axis)[0]) if axis == TIME and len(series) else 0.0


def axis_end(view: View) -> float:
    """The last place that has to be in sight."""
    return view.snapshot.series.end(shown_axis(view))


def shortest_span(view: View) -> float:
    """The shortest stretch that can be looked at."""
    return _NEAREST[shown_axis(view)]


def make_x_scale(view: View, cells: int) -> XScale:
    """Common to all charts: from the beginning to the last step, or to the end of the run once that
    fits nearly as well; or the stretch that the viewer chose. One that follows the newest step
    moves on by a tenth of itself at once.
    """
    axis, start, last = shown_axis(view), axis_start(view), axis_end(view)
    # steps count from 1: so the last step of a full axis is on it
    half = 0.5 if axis == STEP else 0.0
    if view.span is not None:
        dots = max(1, 2 * cells)
        per_dot = XScale.fit(view.span, dots, least=1.0).per_dot
        width = per_dot * dots
        grid = max(1.0, math.floor(width / 10))
        stop = last if view.end is None else view.end
        # By steps the half behind the last one keeps it in sight; elsewhere it must lie before the
        # end.
        grids = (stop - start - width) / grid
        first = start + max(
            0.0, (math.ceil(grids) if axis == STEP else math.floor(grids) + 1) * grid
        )
        return XScale(first + half, per_dot, dots)
    total = float(view.status.total_steps) if view.status and axis == STEP else 0.0
    if last <= total <= last * 1.25:
        last = total
    fit = XScale.fit(last - start, 2 * cells, first=half, least=_LEAST[axis])
    return XScale(start + fit.first, fit.per_dot, fit.dots)


def ranges_to_read(view: View, scale: XScale) -> list[tuple[float, float]]:
    """Stretches of steps that are summed up and looked at so closely that their rows are wanted."""
    series, axis, wanted = view.snapshot.series, shown_axis(view), []
    if not series.thin:
        return []
    low, high = (series.step_at(x, axis) for x in (scale.first, min(scale.last, axis_end(view))))
    high = min(high, float(series.step[series.thin - 1]))
    parts = [
        series,
        *(detail.series for detail in series.details if detail.low <= low and high <= detail.high),
    ]
    if low < high and all(_coarse(part, low, high, scale, axis) for part in parts):
        margin = math.ceil((high - low) / 2)
        wanted.append((max(1.0, low - margin), high + margin))
    elif len(parts) > 1:
        wanted += [(detail.low, detail.high) for detail in series.details if detail.series in parts]
    if view.at is not None and not series.exact(view.at):
        wanted.append((max(1.0, view.at - _NEIGHBOURS), view.at + _NEIGHBOURS))
    return wanted


def _coarse(series: Series, low: float, high: float, scale: XScale, axis: str) -> bool:
    """Whether points that sum up rows are fewer than four a dot column in [low, high]."""
    first, last = (int(at) for at in np.searchsorted(series.step[: series.thin], (low, high)))
    places = series.along(axis)[max(0, first - 1) : last + 1]
    return len(places) > 1 and float(places[-1] - places[0]) * _POINTS > scale.per_dot * (
        len(places) - 1
    )


def axis_rows(view: View, scale: XScale, cells: int) -> list[Row]:
    """The x-axis with its ticks, and the labels below them."""
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
        if first >= 0 and all(
            char == " " for char in labels[max(0, first - 1) : first + len(text) + 1]
        ):
            labels[first : first + len(text)] = text
        at += step
    if axis != STEP:
        line[cells - len(axis) - 1 :] = f" {axis}"
    corner = " " * (GUTTER - 1)
    return ((f"{corner}└{''.join(line)}", "dim"),), ((f"{corner} {''.join(labels)}", "dim"),)


def _stride(least: float, axis: str) -> float:
    """Round distance of two ticks: a clock has its own round numbers."""
    if axis == TIME:
        return float(
            next(
                (seconds for seconds in _CLOCK if seconds >= least), 86400 * round_up(least / 86400)
            )
        )
    return round_up(least)


def format_tick(at: float, axis: str, *, wide: bool) -> str:
    if axis == TIME:
        return format_elapsed(at)
    return format_short_count(at) if axis == TOKENS or wide else format_count(at)


# -- what happened


def iterate_marks(view: View) -> Iterator[tuple[str, int, str]]:
    """(letter, step, label) of all that is marked, the gravest first."""
    for letter in SEVERITY:
        yield from ((letter, step, label) for step, label in _marked(view, letter))


def _marked(view: View, letter: str) -> Sequence[tuple[int, str]]:
    """(step, label) of one kind."""
    if letter == CHECKPOINT:
        return [(step, "") for step in checkpoint_steps(view)]
    return view.snapshot.story.marks.get(letter, ())


def marks_in_view(view: View, scale: XScale, *, all_kinds: bool) -> list[Mark]:
    """The marks in sight. Of hundreds in one cell the newest of the gravest kind stands for all.

    Args:
        all_kinds: with checkpoints and commands; else only what went wrong and what was done.
    """
    found: dict[float, Mark] = {}
    for letter in SEVERITY:
        if letter in (COMMAND, CHECKPOINT) and not all_kinds:
            continue
        known = _marked(view, letter)
        places = view.snapshot.series.places(
            np.array([step for step, _ in known], dtype=np.float64), shown_axis(view)
        )
        cells = np.floor((places - scale.first) / scale.per_dot) // 2
        in_sight = np.flatnonzero((places >= scale.first) & (cells < scale.dots // 2))[::-1]
        taken, newest = np.unique(cells[in_sight], return_index=True)
        for cell, index in zip(taken.tolist(), in_sight[newest].tolist(), strict=True):
            found.setdefault(
                cell, Mark(float(places[index]), letter, known[index][1], _INKS[letter])
            )
    return sorted(found.values(), key=lambda mark: (SEVERITY.index(mark.letter), -mark.x))


def describe_marks_at(view: View, step: float) -> str:
    """What is marked at a step, in letters: "S2 C"."""
    return " ".join(
        dict.fromkeys(
            f"{letter}{label}" for letter, at, label in iterate_marks(view) if at == round(step)
        )
    )


def next_marked_step(view: View, step: float, by: int) -> int | None:
    """The nearest marked step after (`by` 1) or before (-1) a step."""
    steps = [at for _, at, _ in iterate_marks(view)]
    if by > 0:
        return min((at for at in steps if at > step), default=None)
    return max((at for at in steps if at < step), default=None)


def checkpoint_steps(view: View) -> tuple[int, ...]:
    """Only what one can still go back to; hundreds of pruned checkpoints would say nothing."""
    return tuple(s.step for s in view.status.snapshots if s.tier == "disk") if view.status else ()
