"""The keys of the charts: zoom, pan, the cursor, and what is drawn."""

from __future__ import annotations

from dataclasses import replace

from guardrail.tui.chart import axis
from guardrail.tui.chart.axis import GUTTER
from guardrail.tui.chart.chart import SMOOTHINGS, Chart
from guardrail.tui.draw.lines import Row
from guardrail.tui.model.view import View, signal_label
from guardrail.tui.numerics.scales import XScale, format_short
from guardrail.tui.numerics.series import AXES, choosable_signals
from guardrail.tui.panes.table import CURVES
from guardrail.tui.screens.choice_dialogs import Toggle
from guardrail.tui.screens.screen_part import ScreenPart


class ChartKeys(ScreenPart):
    """Part of the dashboard.

    Attributes:
        charts: its chart widgets.
    """

    charts: list[Chart]

    def x_scale(self) -> XScale:
        """Return the x-axis that all charts share."""
        width = self.size.width
        for chart in self.charts:
            if chart.display:
                width = chart.size.width
                break
        return axis.make_x_scale(self.view, max(8, width - GUTTER))

    def action_logarithm(self) -> None:
        self.change_view(logarithmic=self.view.logarithmic ^ {self.view.big})

    def enlarge_other_chart(self, by: int) -> None:
        """Enlarge the next chart (`by` 1) or the one before (-1)."""
        signals = self.view.charts
        self.change_view(big=signals[(signals.index(self.view.big) + by) % len(signals)])

    # -- zoom and pan

    def action_zoom(self, factor: float, about: float | None = None) -> None:
        """Zoom about a place of the axis, else about the cursor; else the newest step stays in
        view.
        """
        scale = self.x_scale()
        shown = scale.per_dot * scale.dots
        span = max(axis.shortest_span(self.view), shown * factor)
        if span >= axis.axis_end(self.view) - axis.axis_start(self.view):
            return self.change_view(span=None, end=None)
        if about is None and self.view.at is not None:
            return self.change_view(span=span, end=self._place_of(self.view.at) + span / 2)
        if about is not None:
            share = (about - scale.first) / shown
            return self.change_view(span=span, end=self._end_of_range(about + (1 - share) * span))
        return self.change_view(span=span)

    def action_pan(self, share: float) -> None:
        if self.view.span is None:
            return self.say("the charts show the complete run; + zooms in")
        scale = self.x_scale()
        width = scale.per_dot * scale.dots
        end = axis.axis_end(self.view) if self.view.end is None else self.view.end
        end = max(axis.axis_start(self.view) + width, end + share * width)
        self.change_view(end=self._end_of_range(end))

    def action_follow(self) -> None:
        self.change_view(end=None, at=None)

    def _end_of_range(self, end: float) -> float | None:
        """Return `View.end`; None, which follows the newest step, where the range reaches it."""
        return None if end >= axis.axis_end(self.view) else end

    # -- the cursor

    def action_cursor(self, cells: int) -> None:
        """Move the cursor; it starts at the newest step. The range in view follows it."""
        if self.view.focus != CURVES:
            return
        now, last = self.view.at, self.view.snapshot.series.last_step
        if now is None:
            return self.go_to(last)
        target = self.step_at(self._place_of(now) + cells * 2 * self.x_scale().per_dot)
        by = 1 if cells > 0 else -1
        if (target - now) * by <= 0:
            target = now + by  # a cell may be narrower than a step
        self.go_to(max(1.0, min(last, target)))

    def action_event(self, by: int) -> None:
        """Move the cursor to the next event (`by` 1), or to the one before (-1)."""
        last = self.view.snapshot.series.last_step
        now = last + 1 if self.view.at is None else self.view.at
        step = axis.next_marked_step(self.view, now, by)
        if step is None:
            return self.say(f"no event {'after' if by > 0 else 'before'} this step")
        self.go_to(max(1.0, min(last, step)))

    def go_to(self, step: float) -> None:
        """Move the cursor to a step, and bring it into view."""
        self.view = replace(self.view, at=step)
        scale, place = self.x_scale(), self._place_of(step)
        if scale.first <= place < scale.last:
            return self.change_view(at=step)
        self.change_view(end=self._end_of_range(place + scale.per_dot * scale.dots / 2))

    def step_at(self, x: float) -> float:
        """Return the step at a place of the axis."""
        series = self.view.snapshot.series
        step = round(series.step_at(x, axis.shown_axis(self.view)))
        return max(1.0, min(series.last_step, step))

    def _place_of(self, step: float) -> float:
        return self.view.snapshot.series.place(step, axis.shown_axis(self.view))

    # -- what is drawn

    def action_smooth(self) -> None:
        smooth = (self.view.smooth + 1) % len(SMOOTHINGS)
        self.change_view(smooth=smooth)
        self.say(f"smoothing: {SMOOTHINGS[smooth]}", "accent")

    def action_axis(self) -> None:
        """Choose the next axis. A range of the old axis means nothing on the new one."""
        chosen = AXES[(AXES.index(self.view.axis) + 1) % len(AXES)]
        self.change_view(axis=chosen, span=None, end=None)
        self.say(f"x-axis: {chosen}", "accent")

    def action_signals(self) -> None:
        """Choose which signals have charts; each choice shows at once."""
        known = tuple(
            dict.fromkeys((*self.view.charts, *choosable_signals(self.view.snapshot.columns)))
        )

        def options() -> list[tuple[Row, str]]:
            return [(_signal_row(self.view, name), "") for name in known]

        def toggle(index: int) -> None:
            name, charts = known[index], list(self.view.charts)
            if name in charts:
                charts.remove(name)
            else:
                charts.append(name)
            if charts:
                big = self.view.big if self.view.big in charts else charts[0]
                self.change_view(charts=tuple(charts), big=big)

        self.app.push_screen(Toggle("charts", self.view, options=options, toggle=toggle))


def _signal_row(view: View, name: str) -> Row:
    value = view.snapshot.series.last(name)
    check = ("✓ ", "good") if name in view.charts else ("· ", "dim")
    newest = "" if value is None else format_short(value)
    return (check, (f"{signal_label(name):<42}", "plain"), (newest, "dim"))
