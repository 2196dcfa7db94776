"""The main screen: charts and panes, and which of them is focused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.screen import Screen

from guardrail.tui.chart import axis
from guardrail.tui.chart.chart import Chart, Sparklines
from guardrail.tui.draw.lines import Lines, Row
from guardrail.tui.model.sent_commands import SentCommands
from guardrail.tui.model.view import View
from guardrail.tui.panes.incidents import newest_incident_rows
from guardrail.tui.panes.table import PANES
from guardrail.tui.screens import header_footer, keys
from guardrail.tui.screens.command_keys import CommandKeys
from guardrail.tui.screens.dialog import Dialog
from guardrail.tui.screens.layout import Layout, arrange_screen
from guardrail.tui.screens.mouse import Mouse
from guardrail.tui.screens.pane_keys import PaneLines

# Fields of the view that the viewer chose: a new snapshot from the reader does not change them.
VIEWER_CHOICES = (
    "charts",
    "big",
    "logarithmic",
    "axis",
    "smooth",
    "span",
    "end",
    "at",
    "focus",
    "full",
    "states",
)
CHART_SLOTS = 6  # charts that can be in view at once
ARRANGED_BY = frozenset({"focus", "full", "big", "charts", "axis"})  # choices that move widgets


class Dashboard(CommandKeys, Mouse, Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            key.keys, key.action, key.label or key.help, show=False, priority=key.keys == "ctrl+p"
        )
        for key in keys.KEYS
    ]
    AUTO_FOCUS = None

    def __init__(self, view: View, commands: SentCommands) -> None:
        super().__init__()
        self.view, self.commands = view, commands
        self.layout_now = Layout(1, 1, ())
        self.charts: list[Chart] = []
        self._lines: list[Lines] = []
        self._pane_lines: list[PaneLines] = []

    def compose(self) -> ComposeResult:
        yield Lines(header_footer.header_rows, id="header")
        with Container(id="body"):
            with Container(id="charts"):
                for slot in range(CHART_SLOTS):
                    yield Chart(slot)
            yield Sparklines()
            with Vertical(id="panes"):
                for pane in PANES:
                    yield PaneLines(pane)
        yield Lines(newest_incident_rows, id="newest")
        yield Lines(header_footer.status_rows, id="facts")
        yield Lines(header_footer.message_rows, id="message")
        yield Lines(self._footer, id="footer")

    def _footer(self, view: View, width: int, height: int) -> Sequence[Row]:
        if self.layout_now.messages:
            return header_footer.footer_rows(view, width, height)
        return header_footer.low_footer_rows(view, width, height)

    def on_mount(self) -> None:
        # Widgets stay: a query in each frame is a good part of a frame in which little happens.
        self._lines = list(self.query(Lines))
        self.charts, self._pane_lines = list(self.query(Chart)), list(self.query(PaneLines))
        self._arrange()
        self.show(self.view)

    def on_resize(self) -> None:
        self._arrange()

    # -- drawing

    def show(self, view: View) -> None:
        """Draw a new view; only what differs reaches the terminal."""
        choices = {name: getattr(self.view, name) for name in VIEWER_CHOICES}
        self.view = replace(view, **choices)
        self.redraw()
        self.put_question()

    def redraw(self) -> None:
        self.view = replace(self.view, message=self.commands.message(self.view))
        self.commands.request_rows(axis.ranges_to_read(self.view, self.x_scale()))
        for lines in self._lines:
            lines.show(self.view)
        top = self.app.screen
        if isinstance(top, Dialog):
            top.show(self.view)

    def change_view(self, **changes: object) -> None:
        self.view = replace(self.view, **changes)  # type: ignore[arg-type]
        if ARRANGED_BY & changes.keys():
            self._arrange()
        self.redraw()

    def _arrange(self) -> None:
        """Show what has a place at this size, in its place."""
        width, height = self.size
        signals = self.view.charts
        self.layout_now = layout = arrange_screen(
            width, height, self.view.focus, full=self.view.full, signals=len(signals)
        )
        self.set_class(layout.beside and bool(layout.panes) and layout.charts > 0, "-beside")
        shown = _signals_in_view(self.view, layout.charts)
        self._arrange_charts(layout, shown)
        others = [signal for signal in signals if signal != self.view.big]
        sparklines = others[: layout.sparks]
        self.query_one("#sparks").styles.height = max(1, len(sparklines))
        self.query_one("#sparks").display = bool(sparklines)
        self.commands.choose_signals((*shown, *sparklines), self.view.axis)
        for lines in self._pane_lines:
            lines.display = lines.pane.name in layout.panes
            lines.set_class(lines.pane.name == self.view.focus, "focused")
        self.query_one("#panes").display = bool(layout.panes)
        self.query_one("#newest").display = layout.newest
        self.query_one("#message").display = layout.messages

    def _arrange_charts(self, layout: Layout, shown: Sequence[str]) -> None:
        grid = self.query_one("#charts")
        grid.display = layout.charts > 0
        grid.styles.grid_size_columns = max(1, layout.columns)
        # In one column the enlarged chart is half as high again as the others.
        tall = self.view.big if layout.columns == 1 else ""
        heights = ["2fr"] * len(shown)
        if tall in shown:
            heights[list(shown).index(tall)] = "3fr"
        grid.styles.grid_rows = " ".join(heights) or "2fr"
        for slot, chart in enumerate(self.charts):
            chart.display = slot < len(shown)
            chart.signal = shown[slot] if slot < len(shown) else ""


def _signals_in_view(view: View, charts: int) -> Sequence[str]:
    """Return the signals that have a chart: the first ones, and always the enlarged one."""
    first = view.charts[: min(charts, CHART_SLOTS)]
    if view.big in first or not first:
        return first
    return (*first[:-1], view.big)
