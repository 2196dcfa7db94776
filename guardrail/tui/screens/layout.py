"""Where things stand on a terminal of any size. Pure.

Wide: a grid of charts, and panes beside it. 80x24: one chart, the other signals as curves of one
row, the newest incident. Narrow and tall: charts above, panes below. The focused pane is always in
view.
"""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.tui.panes.table import CURVES

WIDE, HIGH = 100, 26  # from this size on there are several charts and a side
GRID = 160  # cells from which on charts stand in two columns
TALL = 36  # rows from which on a narrow terminal stacks
ROOMY, AIRY = 18, 22  # rows from which on two, then three of the hidden charts have a line each
_CHART_ROWS = 8  # rows that a chart wants
_AROUND = 4  # rows of header, facts, message and footer
_SIDES = (
    (52, ("incidents", "ranks", "snapshots", "data", "log")),
    (38, ("incidents", "ranks", "snapshots", "log")),
)
_SIDE = ("incidents", "snapshots", "log")


@dataclass(frozen=True)
class Layout:
    """What is in view.

    Attributes:
        columns: of the grid of charts.
        charts: how many charts are in view.
        panes: names of the panes beside or below the charts, in order.
        beside: the panes stand right of the charts, not below.
        sparks: rows for signals without a chart.
        newest: the newest incident has its two rows.
        messages: there is a row for messages; without it a message replaces the keys.
    """

    columns: int
    charts: int
    panes: tuple[str, ...]
    beside: bool = True
    sparks: int = 0
    newest: bool = False
    messages: bool = True


def arrange_screen(
    width: int, height: int, focus: str, *, full: bool = False, signals: int = 6
) -> Layout:
    """Return the layout of a terminal of `width` x `height`.

    Args:
        full: the focused pane fills the terminal.
    """
    columns = 2 if width >= GRID else 1
    rows = max(1, min(3, (height - _AROUND) // _CHART_ROWS))
    charts = min(signals, columns * rows)
    wide = width >= WIDE and height >= HIGH
    roomy = height >= ROOMY
    if full and focus != CURVES:
        return Layout(0, 0, (focus,), messages=roomy)
    if full and wide:
        return Layout(columns, charts, ())
    if wide:
        side = next((panes for least, panes in _SIDES if height >= least), _SIDE)
        return Layout(columns, charts, _with(side, focus))
    if height >= TALL:
        return Layout(1, min(charts, 3), _with(("incidents", "log"), focus), beside=False)
    if focus != CURVES:
        return Layout(0, 0, (focus,), messages=roomy)
    return Layout(1, 1, (), sparks=_sparklines(height), newest=True, messages=roomy)


def _sparklines(height: int) -> int:
    """Return how many signals without a chart have a row."""
    if height >= AIRY:
        return 3
    return 2 if height >= ROOMY else 0


def _with(panes: tuple[str, ...], focus: str) -> tuple[str, ...]:
    """Return the panes with the focused one: it replaces the last but one where it is missing."""
    if focus in (CURVES, *panes):
        return panes
    return (*panes[:-2], focus, *panes[-1:])
