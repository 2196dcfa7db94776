"""A chart as rows: title, plot, and for the enlarged one an axis with marks. The drawing is raster's."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import numpy as np

from guardrail.tui import raster
from guardrail.tui.format import count, metric
from guardrail.tui.lines import Lines, Piece, Row, fit, title
from guardrail.tui.log import CHECKPOINT, COMMAND, INCIDENT, ROLLBACK, SKIP
from guardrail.tui.palette import BAND
from guardrail.tui.raster import Ink
from guardrail.tui.scales import XScale, nice, short
from guardrail.tui.view import LABELS, View

GUTTER = 8  # cells left of the plot: a label of at most seven and the axis
_LABEL_CELLS = 12  # distance of two labels of the x-axis, at least
# A letter that falls on the same cell as another gives way to the graver one.
_GRAVITY = (ROLLBACK, SKIP, INCIDENT, COMMAND, CHECKPOINT)
_MARK_TONES = {ROLLBACK: "warn", SKIP: "warn", INCIDENT: "warn", COMMAND: "accent", CHECKPOINT: "good"}
_TONES = {
    Ink.EMPTY: "plain",
    Ink.GHOST: "ghost",
    Ink.THRESHOLD: "threshold",
    Ink.CLIP: "warn",
    Ink.BAD: "bad",
    Ink.GHOST_CLIP: "warn",
    Ink.GHOST_BAD: "bad",
    Ink.RULE: "faint",
}


class Chart(Lines):
    """One signal. A frame of the same rows at the same size is not computed again."""

    def __init__(self, signal: str) -> None:
        super().__init__(self._chart, id=signal, classes="chart")
        self.signal = signal
        self._sources: tuple[object, ...] = ()
        self._settings: tuple[object, ...] = ()
        self._drawn: Sequence[Row] = ()

    def _chart(self, view: View, width: int, height: int) -> Sequence[Row]:
        snapshot, status = view.snapshot, view.status
        sources = (snapshot.series, snapshot.story.marks)
        run = (status.total_steps, _checkpoints(view)) if status else ()
        settings = (run, snapshot.loaded, view.big, view.logarithmic, view.span, view.end, view.at, width, height)
        same = len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))
        if not same or settings != self._settings:
            self._sources, self._settings = sources, settings
            self._drawn = chart_rows(view, self.signal, width, height)
        return self._drawn


def chart_rows(view: View, signal: str, width: int, height: int) -> list[Row]:
    """Title and plot in `width` x `height` cells; the enlarged chart has an axis with marks and labels below."""
    big = view.big == signal
    axis = 2 if big and height >= 8 else 1 if big and height >= 5 else 0
    head = _title(view, signal, width)
    rows = height - 1 - axis
    cells = width - GUTTER
    if rows < 1 or cells < 8:
        return [head][:height]
    scale = x_scale(view, cells)
    drawn = _plot(view, signal, scale, rows)
    nothing = not len(view.snapshot.series) and not view.snapshot.series.ghosts
    labels = {} if nothing else dict(drawn.ticks)
    plot = [(_gutter(labels.get(y)), *_pieces(drawn, y, signal)) for y in range(rows)]
    if nothing:
        text = "no steps yet" if view.snapshot.loaded else "reading the metrics"
        plot[rows // 2] = (_gutter(None), (text.center(cells), "dim"))
    return [head, *plot, *_axis(view, scale, cells)[:axis]]


def spark_row(view: View, signal: str, width: int) -> Row:
    """A signal in one row: name, last value, a curve of four dots' height."""
    name, value = LABELS[signal], _value(view, signal)
    head: Row = ((f" {name:<24}", "dim"), (f"{value[0]:>8} ", value[1]))
    cells = width - 34
    if cells < 8:
        return fit(head, width)
    scale = x_scale(view, cells)
    return (*head, *_pieces(_plot(view, signal, scale, 1), 0, signal))


def x_scale(view: View, cells: int) -> XScale:
    """Common to all charts: from 0 to the last step, or to the end of the run once that fits nearly as well; or the
    stretch that the viewer chose. One that follows the newest step moves on by a tenth of itself at a time.
    """
    last = view.snapshot.series.furthest
    if view.span is not None:
        dots = max(1, 2 * cells)
        per_dot = XScale.fit(view.span, dots, least=1.0).per_dot
        width = per_dot * dots
        grid = max(1.0, math.floor(width / 10))
        end = last if view.end is None else view.end
        return XScale(max(0.0, math.ceil((end - width) / grid) * grid) + 0.5, per_dot, dots)
    total = float(view.status.total_steps) if view.status else 0.0
    if last <= total <= last * 1.25:
        last = total
    # Steps count from 1: half a step before it the axis begins, so that the last step of a full axis is on it.
    return XScale.fit(last, 2 * cells, first=0.5)


def _plot(view: View, signal: str, scale: XScale, rows: int) -> raster.Plot:
    series = view.snapshot.series
    band: list[np.ndarray | None] = [None, None]
    if rows > 1:
        for index, part in enumerate(("baseline", "threshold")):
            values = series.values.get(f"{signal}_{part}")
            band[index] = raster.sample(series.step, values, scale) if values is not None else None
    rules = [scale.cell(step) for step, _ in view.snapshot.story.marks.get(ROLLBACK, ())] if rows > 1 else []
    rules += [scale.cell(view.at)] if view.at is not None and rows > 1 else []
    return raster.plot(
        series.curve(signal),
        scale,
        height=rows,
        log=signal in view.logarithmic,
        ghosts=[ghost.curve(signal) for ghost in series.ghosts],
        baseline=band[0],
        threshold=band[1],
        rules=rules,
    )


def _value(view: View, signal: str) -> Piece:
    series = view.snapshot.series
    value = series.last(signal) if view.at is None else series.at(signal, view.at)
    if value is None:
        return "–", "dim"
    return ("× NaN", "bad") if math.isnan(value) else (short(value), "strong")


def _title(view: View, signal: str, width: int) -> Row:
    right: list[Piece] = []
    series, name = view.snapshot.series, f"{signal}_threshold"
    threshold = series.last(name) if view.at is None else series.at(name, view.at)
    if threshold is not None and math.isfinite(threshold) and width >= 56:
        right.append((f"threshold {short(threshold)}   ", "threshold"))
    if view.at is not None:
        right.append((f"step {count(view.at)}  ", "accent"))
    right.append(_value(view, signal))
    name = LABELS[signal] + (" (log)" if signal in view.logarithmic else "")
    return title(name, width, right=tuple(right), tone="strong" if view.big == signal else "dim")


def _gutter(label: str | None) -> Piece:
    return (f"{label[: GUTTER - 1]:>{GUTTER - 1}}┤" if label else " " * (GUTTER - 1) + "│", "dim")


def _pieces(drawn: raster.Plot, y: int, signal: str) -> Row:
    """A row of cells as runs of one tone."""
    inks, band = drawn.inks[y].astype(np.int64), drawn.band[y]
    text = drawn.text(y)
    kinds = inks * 2 + band
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    pieces = []
    for first, end in itertools.pairwise(cuts):
        ink = Ink(int(inks[first]))
        tone = signal if ink is Ink.LINE else _TONES[ink]
        pieces.append((text[first:end], tone + BAND if band[first] else tone))
    return tuple(pieces)


def _axis(view: View, scale: XScale, cells: int) -> list[Row]:
    """The x-axis with ticks and marks, and the steps below the ticks."""
    line: list[Piece] = [("─", "dim")] * cells
    numbers = [" "] * cells
    step = nice(scale.per_dot * 2 * _LABEL_CELLS)
    at = math.ceil((scale.first - 0.5) / step) * step
    while (cell := max(0, scale.cell(at))) < cells:
        line[cell] = ("┬", "dim")
        text = count(at) if scale.last < 1e6 else metric(at)
        start = min(max(0, cell - len(text) // 2), cells - len(text))
        if start >= 0 and all(c == " " for c in numbers[max(0, start - 1) : start + len(text) + 1]):
            numbers[start : start + len(text)] = text
        at += step
    _put_marks(view, scale, line)
    merged = [("".join(text for text, _ in group), tone) for tone, group in itertools.groupby(line, lambda p: p[1])]
    corner = " " * (GUTTER - 1)
    return [((corner + "└", "dim"), *merged), ((corner + " ", "dim"), ("".join(numbers), "dim"))]


def _put_marks(view: View, scale: XScale, line: list[Piece]) -> None:
    """Letters on the axis, with the incident's number where the cells beside are free."""
    marks = dict(view.snapshot.story.marks)
    marks[CHECKPOINT] = tuple((step, "") for step in _checkpoints(view))
    taken: dict[int, str] = {}
    for letter in _GRAVITY:
        for at, label in marks.get(letter, ()):
            cell = scale.cell(at)
            if 0 <= cell < len(line) and taken.get(cell, letter) == letter:
                taken[cell] = letter
                line[cell] = (letter, _MARK_TONES[letter])
                for offset, digit in enumerate(label, 1):
                    if cell + offset < len(line) and cell + offset not in taken:
                        line[cell + offset] = (digit, _MARK_TONES[letter])
                        taken[cell + offset] = digit


def _checkpoints(view: View) -> tuple[int, ...]:
    """Only what one can still go back to; hundreds of pruned checkpoints would say nothing."""
    return tuple(s.step for s in view.status.snapshots if s.tier == "disk") if view.status else ()
