"""A chart as rows: title, plot with marks, and for the enlarged one an axis. The drawing is
raster's and overlay's.
"""

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
    """One signal, which may change. A frame of the same rows at the same size is not computed
    again.
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
    """Title and plot in `width` x `height` cells; the enlarged chart has an axis with labels below.

    Args:
        memory: of the chart that is drawn again and again.
    """
    big = view.big == signal
    below = 2 if big and height >= 8 else 1 if big and height >= 5 else 0
    head = _title(view, signal, width)
    rows = height - 1 - below
    cells = width - GUTTER
    if rows < 1 or cells < 8:
        return [head][:height]
    scale = axis.make_x_scale(view, cells)
    nothing = not len(view.snapshot.series) and not view.snapshot.series.abandoned
    memory = memory or PlotCache()
    given = memory.eye.look(view, signal, scale, rows)
    plot = list(memory.rows(given, _tones(view, signal), ticks=not nothing))
    if nothing:
        text = "no steps yet" if view.snapshot.loaded else "reading the metrics"
        plot[rows // 2] = (_gutter(None), (text.center(cells), "dim"))
    elif signal not in view.snapshot.series.values:
        plot[rows // 2] = (_gutter(None), ("not in the rows of this run".center(cells), "dim"))
    return [head, *plot, *(axis.axis_rows(view, scale, cells)[:below] if below else ())]


class Sparklines(Lines):
    """The first signals whose charts are hidden, a row each."""

    def __init__(self) -> None:
        super().__init__(self._sparks, id="sparks")
        self._memories: dict[str, PlotCache] = {}

    def _sparks(self, view: View, width: int, height: int) -> Sequence[Row]:
        signals = [signal for signal in view.charts if signal != view.big][:height]
        self._memories = {signal: self._memories.get(signal) or PlotCache() for signal in signals}
        return [draw_sparkline(view, signal, width, self._memories[signal]) for signal in signals]


def draw_sparkline(view: View, signal: str, width: int, memory: PlotCache | None = None) -> Row:
    """A signal in one row: name, last value, a curve of four dots' height."""
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
    return (
        *head,
        *memory.rows(memory.eye.look(view, signal, scale, 1), _tones(view, signal), gutter=False)[
            0
        ],
    )


class PlotCache:
    """The last plot of a chart, in rows."""

    def __init__(self) -> None:
        self.eye = ColumnCache()
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
        """Drawn anew only if something else is given."""
        key = (*given.key(), tones, ticks)
        if key != self._key:
            drawn = _draw(given)
            labels = dict(drawn.ticks) if ticks else {}
            self._key = key
            self._rows = [
                (*([_gutter(labels.get(y))] if gutter else ()), *_pieces(drawn, y, tones))
                for y in range(given.rows)
            ]
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


def _value(view: View, signal: str) -> Piece:
    series = view.snapshot.series
    if view.at is not None and not series.exact(view.at):
        return "…", "dim"  # being read
    value = series.last(signal) if view.at is None else series.at(signal, view.at)
    if value is None:
        return "–", "dim"
    if math.isnan(value):
        return ("× NaN", "bad")
    return (format_short(value), "strong")


def _title(view: View, signal: str, width: int) -> Row:
    right: list[Piece] = [("reading the file   ", "accent")] if view.waits else []
    series, name = view.snapshot.series, f"{signal}_threshold"
    threshold = series.last(name) if view.at is None else series.at(name, view.at)
    if threshold is not None and math.isfinite(threshold) and width >= 56:
        right.append((f"threshold {format_short(threshold)}   ", "threshold"))
    if view.at is not None:
        there = axis.describe_marks_at(view, view.at)
        right.append((f"{there}  " if there and width >= 40 else "", "warn"))
        right.append((f"step {format_count(view.at)}  ", "accent"))
    right.append(_value(view, signal))
    ways = [
        name
        for name, on in (("log", signal in view.logarithmic), ("smoothed", view.smooth > 0))
        if on
    ]
    name = signal_label(signal) + (f" ({', '.join(ways)})" if ways else "")
    return title_row(
        name, width, right=tuple(right), tone="strong" if view.big == signal else "dim"
    )


def _tones(view: View, signal: str) -> dict[Ink, str]:
    """The curve has its signal's colour; under a smoothed one the raw one is pale."""
    curve = palette.curve_tone(signal, view.charts)
    return _TONES | ({Ink.LINE: "raw", Ink.SMOOTH: curve} if view.smooth else {Ink.LINE: curve})


def _gutter(label: str | None) -> Piece:
    return (f"{label[: GUTTER - 1]:>{GUTTER - 1}}┤" if label else " " * (GUTTER - 1) + "│", "dim")


def _pieces(drawn: raster.Plot, y: int, tones: Mapping[Ink, str]) -> Row:
    """A row of cells as runs of one tone."""
    inks, band = drawn.inks[y].astype(np.int64), drawn.band[y]
    text = drawn.text(y)
    kinds = inks * 2 + band
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    pieces = []
    for first, end in itertools.pairwise(cuts):
        tone = tones[Ink(int(inks[first]))]
        pieces.append((text[first:end], tone + BAND if band[first] else tone))
    return tuple(pieces)
