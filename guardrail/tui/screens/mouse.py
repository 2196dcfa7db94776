"""The mouse: clicks select, the wheel zooms charts and scrolls lists. It never sends a command."""

from __future__ import annotations

from textual.events import Click, MouseEvent, MouseScrollDown, MouseScrollUp

from guardrail.tui.chart.axis import GUTTER
from guardrail.tui.chart.chart import Chart
from guardrail.tui.panes.frame import entry_of_row
from guardrail.tui.panes.table import CURVES
from guardrail.tui.screens.chart_keys import ChartKeys
from guardrail.tui.screens.pane_keys import PaneKeys, PaneLines

WHEEL_FACTOR = 1.5  # of the zoom, for one notch of the wheel


class Mouse(ChartKeys, PaneKeys):
    """Part of the dashboard."""

    def on_click(self, event: Click) -> None:
        """Focus the pane or chart that was clicked.

        A click on an entry selects it, and the charts jump to its step. A click on the enlarged
        chart moves the cursor there.
        """
        widget = event.widget
        if isinstance(widget, PaneLines):
            self.change_view(focus=widget.pane.name)
            self._click_entry(widget, event.screen_y - widget.region.y)
        elif isinstance(widget, Chart):
            was_big = widget.signal == self.view.big
            self.change_view(focus=CURVES, big=widget.signal)
            if was_big and (place := self._pointed(event)) is not None:
                self.go_to(self.step_at(place))

    def _click_entry(self, widget: PaneLines, row: int) -> None:
        if not 0 <= row < len(widget.rows):
            return
        index = entry_of_row(widget.rows[row])
        if index is not None:
            self.choose_in_pane(cursor=index)
            self.go_to_entry()

    def _pointed(self, event: MouseEvent) -> float | None:
        """Return the place of the axis under the mouse; None outside of a plot."""
        chart = event.widget
        if not isinstance(chart, Chart):
            return None
        cell = event.screen_x - chart.region.x - GUTTER
        scale = self.x_scale()
        if not 0 <= cell < scale.dots // 2:
            return None
        return scale.first + (2 * cell + 1) * scale.per_dot

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self._turn_wheel(event, -1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self._turn_wheel(event, 1)

    def _turn_wheel(self, event: MouseEvent, by: int) -> None:
        """Zoom the charts about the mouse, or move through the entries of a list."""
        widget = event.widget
        if isinstance(widget, Chart):
            self.action_zoom(WHEEL_FACTOR**by, self._pointed(event))
        elif isinstance(widget, PaneLines):
            self.change_view(focus=widget.pane.name)
            self.action_move(by)
