"""A chart as rows: title, plot with marks, and for the enlarged chart an axis."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from guardrail.core.format import format_count
from guardrail.tui.chart import axis, overlay
from guardrail.tui.chart.axis import GUTTER
from guardrail.tui.chart.column_cache import ColumnCache, PlotInput
from guardrail.tui.draw import palette
from guardrail.tui.draw.lines import Lines, Piece, Row, fit_row, row_width, title_row
from guardrail.tui.draw.palette import BAND
from guardrail.tui.model.view import View, signal_label
from guardrail.tui.numerics import raster
from guardrail.tui.numerics.raster import Ink
from guardrail.tui.numerics.scales import format_short

SMOOTHINGS = ("off", "light", "strong")
# What a chart says instead of a curve, and beside one whose rows are read again.
NO_STEPS, READING, NOT_RECORDED = (
    "no steps yet",
    "reading the metrics",
    "not in the rows of this run",
)
READING_FILE = "reading the file"
_TONES = {
    Ink.EMPTY: "plain",
    Ink.ABANDONED: "abandoned",
    Ink.THRESHOLD: "threshold",
    Ink.CLIP: "warn",
    Ink.BAD: "bad",
    Ink.ABANDONED_CLIP: "warn",
    Ink.ABANDONED_BAD: "bad",
    Ink.RULE: "faint",
    Ink.WARN: "warn",
    Ink.NEWS: "key",
    Ink.GOOD: "good",
}


class Chart(Lines):
    """The chart of one signal, which may change.

    The same rows at the same size are not drawn again.
    """

    def __init__(self, slot: int) -> None:
        super().__init__(self._chart, id=f"chart-{slot}", classes="chart")
        self.signal = ""
        self._sources: tuple[object, ...] = ()
        self._settings: tuple[object, ...] = ()
        self._drawn: Sequence[Row] = ()
        self._memory = PlotCache()

    def _chart(self, view: View, width: int, height: int) -> Sequence[Row]:
        snapshot, status = view.snapshot, view.status
        sources = (snapshot.series, snapshot.story.marks)
        run = (status.total_steps, axis.checkpoint_steps(view)) if status else ()
        chosen = (
            self.signal,
            view.big,
            view.logarithmic,
            view.span,
            view.end,
            view.at,
            view.axis,
            view.smooth,
        )
        settings = (run, snapshot.loaded, snapshot.columns, view.waits, *chosen, width, height)
        same = len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))
        if not same or settings != self._settings:
            self._sources, self._settings = sources, settings
            self._drawn = draw_chart(view, self.signal, width, height, self._memory)
        return self._drawn


def draw_chart(
    view: View, signal: str, width: int, height: int, memory: PlotCache | None = None
) -> list[Row]:
    """Return title and plot in `width` x `height` cells; the enlarged chart has an axis below.

    Args:
        memory: the last plot of a chart that is drawn again and again.
    """
    below = _rows_below(height) if view.big == signal else 0
    head = _title(view, signal, width)
    rows = height - 1 - below
    cells = width - GUTTER
    if rows < 1 or cells < 8:
        return [head][:height]
    scale = axis.make_x_scale(view, cells)
    nothing = not len(view.snapshot.series) and not view.snapshot.series.abandoned
    memory = memory or PlotCache()
    given = memory.columns.look(view, signal, scale, rows)
    plot = list(memory.rows(given, _tones(view, signal), ticks=not nothing))
    if nothing:
        text = NO_STEPS if view.snapshot.loaded else READING
        plot[rows // 2] = (_gutter(None), (text.center(cells), "dim"))
    elif signal not in view.snapshot.series.values:
        plot[rows // 2] = (_gutter(None), (NOT_RECORDED.center(cells), "dim"))
    if not below:
        return [head, *plot]
    return [head, *plot, *axis.axis_rows(view, scale, cells)[:below]]


def _rows_below(height: int) -> int:
    """Return the rows of the x-axis: a low chart has no labels, a very low one no axis."""
    if height >= 8:
        return 2
    return int(height >= 5)


class Sparklines(Lines):
    """The first signals whose charts are not shown, a row each."""

    def __init__(self) -> None:
        super().__init__(self._sparks, id="sparks")
        self._memories: dict[str, PlotCache] = {}

    def _sparks(self, view: View, width: int, height: int) -> Sequence[Row]:
        signals = [signal for signal in view.charts if signal != view.big][:height]
        self._memories = {signal: self._memories.get(signal) or PlotCache() for signal in signals}
        return [draw_sparkline(view, signal, width, self._memories[signal]) for signal in signals]


def draw_sparkline(view: View, signal: str, width: int, memory: PlotCache | None = None) -> Row:
    """Return a signal in one row: name, last value, and a curve four dots high."""
    value = _value(view, signal)
    name = fit_row((((signal_label(signal)), "dim"),), 24)
    head: Row = (
        (" ", "plain"),
        *name,
        (" " * (24 - row_width(name)), "plain"),
        (f"{value[0]:>8} ", value[1]),
    )
    cells = width - 34
    if cells < 8:
        return fit_row(head, width)
    scale = axis.make_x_scale(view, cells)
    memory = memory or PlotCache()
    given = memory.columns.look(view, signal, scale, 1)
    (curve,) = memory.rows(given, _tones(view, signal), gutter=False)
    return (*head, *curve)


class PlotCache:
    """The last plot of a chart, in rows."""

    def __init__(self) -> None:
        self.columns = ColumnCache()
        self._key: tuple[object, ...] = ()
        self._rows: list[Row] = []

    def rows(
        self,
        given: PlotInput,
        tones: Mapping[Ink, str],
        *,
        ticks: bool = False,
        gutter: bool = True,
    ) -> list[Row]:
        """Return the rows of a plot; they are drawn again only where the input differs."""
        key = (*given.key(), tones, ticks)
        if key != self._key:
            drawn = _draw(given)
            labels = dict(drawn.ticks) if ticks else {}
            rows = [_pieces(drawn, y, tones) for y in range(given.rows)]
            if gutter:
                rows = [(_gutter(labels.get(y)), *line) for y, line in enumerate(rows)]
            self._key, self._rows = key, rows
        return self._rows


def _draw(given: PlotInput) -> raster.Plot:
    drawn = raster.draw_plot(
        given.main,
        given.pale,
        height=given.rows,
        log=given.log,
        baseline=given.baseline,
        threshold=given.threshold,
        rules=given.rules,
    )
    if given.places is not None:
        overlay.draw_smoothed(drawn, given.places)
    overlay.put_marks(drawn, given.scale, given.marks)
    return drawn


def _shown_value(view: View, column: str) -> float | None:
    """Return the value of a column at the cursor, or the newest one."""
    series = view.snapshot.series
    if view.at is None:
        return series.last(column)
    return series.at(column, view.at)


def _value(view: View, signal: str) -> Piece:
    series = view.snapshot.series
    if view.at is not None and not series.exact(view.at):
        return "…", "dim"  # being read
    value = _shown_value(view, signal)
    if value is None:
        return "–", "dim"
    if math.isnan(value):
        return ("× NaN", "bad")
    return (format_short(value), "strong")


def _title(view: View, signal: str, width: int) -> Row:
    ways = []
    if signal in view.logarithmic:
        ways.append("log")
    if view.smooth > 0:
        ways.append("smoothed")
    name = signal_label(signal)
    if ways:
        name += f" ({', '.join(ways)})"
    tone = "strong" if view.big == signal else "dim"
    return title_row(name, width, right=_values(view, signal, width), tone=tone)


def _values(view: View, signal: str, width: int) -> Row:
    """Return what stands right in the title: threshold, marks and step at the cursor, value."""
    right: list[Piece] = []
    if view.waits:
        right.append((f"{READING_FILE}   ", "accent"))
    threshold = _shown_value(view, f"{signal}_threshold")
    if threshold is not None and math.isfinite(threshold) and width >= 56:
        right.append((f"threshold {format_short(threshold)}   ", "threshold"))
    if view.at is not None:
        marks = axis.describe_marks_at(view, view.at)
        if marks and width >= 40:
            right.append((f"{marks}  ", "warn"))
        right.append((f"step {format_count(view.at)}  ", "accent"))
    right.append(_value(view, signal))
    return tuple(right)


def _tones(view: View, signal: str) -> dict[Ink, str]:
    """Return the tones of a plot: the curve has the colour of its signal.

    A raw curve under a smoothed one is pale.
    """
    curve = palette.curve_tone(signal, view.charts)
    if view.smooth:
        return _TONES | {Ink.LINE: "raw", Ink.SMOOTH: curve}
    return _TONES | {Ink.LINE: curve}


def _gutter(label: str | None) -> Piece:
    if not label:
        return (" " * (GUTTER - 1) + "│", "dim")
    return (f"{label[: GUTTER - 1]:>{GUTTER - 1}}┤", "dim")


def _pieces(drawn: raster.Plot, y: int, tones: Mapping[Ink, str]) -> Row:
    """Return a row of cells as pieces of one tone each."""
    inks, band = drawn.inks[y].astype(np.int64), drawn.band[y]
    text = drawn.text(y)
    kinds = inks * 2 + band
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    pieces = []
    for first, end in itertools.pairwise(cuts):
        tone = tones[Ink(int(inks[first]))]
        if band[first]:
            tone += BAND
        pieces.append((text[first:end], tone))
    return tuple(pieces)
