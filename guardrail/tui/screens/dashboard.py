"""The one screen: charts and panes, which of them has the keys, and what the keys do to what is
seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.events import Click, MouseEvent, MouseScrollDown, MouseScrollUp
from textual.screen import Screen

from guardrail.tui.chart import axis
from guardrail.tui.chart.axis import GUTTER
from guardrail.tui.chart.chart import SMOOTHINGS, Chart, Sparklines
from guardrail.tui.draw.lines import Lines, Row
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.sent_commands import SentCommands
from guardrail.tui.model.view import View, signal_label
from guardrail.tui.numerics.scales import XScale, format_short
from guardrail.tui.numerics.series import AXES, choosable_signals
from guardrail.tui.panes.frame import entry_of_row
from guardrail.tui.panes.incidents import newest
from guardrail.tui.panes.log import log_rows
from guardrail.tui.panes.table import BY_NAME, CURVES, NAMES, PANES, Pane
from guardrail.tui.screens import header_footer as panels
from guardrail.tui.screens import keys
from guardrail.tui.screens.command_keys import CommandKeys
from guardrail.tui.screens.dialogs import Dialog, Pager, Palette, Text, Toggle
from guardrail.tui.screens.layout import Layout, arrange_screen
from guardrail.tui.terminal.themed_app import ThemedApp

# What the viewer chose, which a new view from the reader does not change.
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
SLOTS = 6  # charts that can be in sight at once


class PaneLines(Lines):
    """A pane on the screen; a click gives it the keys."""

    def __init__(self, pane: Pane) -> None:
        super().__init__(self._content, id=f"pane-{pane.name}", classes="pane")
        self.pane = pane

    def _content(self, view: View, width: int, height: int) -> Sequence[Row]:
        return self.pane.build(view, width, height, view.state(self.pane.name))


class Dashboard(CommandKeys, Screen[None]):
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
        self._lines: list[Lines] = []
        self._charts: list[Chart] = []
        self._pane_lines: list[PaneLines] = []

    def compose(self) -> ComposeResult:
        yield Lines(panels.header_rows, id="header")
        with Container(id="body"):
            with Container(id="charts"):
                for slot in range(SLOTS):
                    yield Chart(slot)
            yield Sparklines()
            with Vertical(id="panes"):
                for pane in PANES:
                    yield PaneLines(pane)
        yield Lines(newest, id="newest")
        yield Lines(panels.status_rows, id="facts")
        yield Lines(panels.message_rows, id="message")
        yield Lines(self._footer, id="footer")

    def _footer(self, view: View, width: int, height: int) -> Sequence[Row]:
        return (panels.footer_rows if self.layout_now.messages else panels.low_footer_rows)(
            view, width, height
        )

    def on_mount(self) -> None:
        # What is here stays here; to ask for it anew is a good part of a frame in which little
        # happens.
        self._lines = list(self.query(Lines))
        self._charts, self._pane_lines = list(self.query(Chart)), list(self.query(PaneLines))
        self._arrange()
        self.show(self.view)

    def on_resize(self) -> None:
        self._arrange()

    # -- drawing

    def show(self, view: View) -> None:
        """Draw a new view; only what differs reaches the terminal."""
        mine = {name: getattr(self.view, name) for name in VIEWER_CHOICES}
        self.view = replace(view, **mine)
        self.redraw()
        self.put_question()

    def redraw(self) -> None:
        self.view = replace(self.view, message=self.commands.message(self.view))
        self.commands.request_rows(axis.ranges_to_read(self.view, self._scale()))
        for lines in self._lines:
            lines.show(self.view)
        top = self.app.screen
        if isinstance(top, Dialog):
            top.show(self.view)

    def look(self, **changes: object) -> None:
        """The viewer looks at it in another way."""
        moves = {"focus", "full", "big", "charts", "axis"} & changes.keys()
        self.view = replace(self.view, **changes)  # type: ignore[arg-type]
        if moves:
            self._arrange()
        self.redraw()

    def _arrange(self) -> None:
        """Show what has a place at this size, in its place."""
        width, height = self.size
        signals = self.view.charts
        self.layout_now = found = arrange_screen(
            width, height, self.view.focus, full=self.view.full, signals=len(signals)
        )
        self.set_class(found.beside and bool(found.panes) and found.charts > 0, "-beside")
        shown = _in_sight(self.view, found.charts)
        grid = self.query_one("#charts")
        grid.display = found.charts > 0
        grid.styles.grid_size_columns = max(1, found.columns)
        # Where charts stand in one column the enlarged one is a half higher than the others.
        grid.styles.grid_rows = " ".join(
            "3fr" if signal == self.view.big and found.columns == 1 else "2fr"
            for signal in shown or ("",)
        )
        for slot, chart in enumerate(self._charts):
            chart.display = slot < len(shown)
            chart.signal = shown[slot] if slot < len(shown) else ""
        sparks = [signal for signal in signals if signal != self.view.big][: found.sparks]
        self.query_one("#sparks").styles.height = max(1, len(sparks))
        self.commands.choose_signals((*shown, *sparks), self.view.axis)
        for lines in self._pane_lines:
            lines.display = lines.pane.name in found.panes
            lines.set_class(lines.pane.name == self.view.focus, "focused")
        self.query_one("#panes").display = bool(found.panes)
        self.query_one("#sparks").display = bool(sparks)
        self.query_one("#newest").display = found.newest
        self.query_one("#message").display = found.messages

    # -- looking

    def action_pane(self, name: str) -> None:
        self.look(focus=name)

    def action_next_pane(self, by: int) -> None:
        self.look(focus=NAMES[(NAMES.index(self.view.focus) + by) % len(NAMES)])

    def action_full(self) -> None:
        self.look(full=not self.view.full)

    def action_logarithm(self) -> None:
        self.look(logarithmic=self.view.logarithmic ^ {self.view.big})

    def action_move(self, by: int) -> None:
        if self.view.focus == CURVES:
            if abs(by) == 1:
                signals = self.view.charts
                self.look(big=signals[(signals.index(self.view.big) + by) % len(signals)])
            return
        pane, state = self._pane()
        count = pane.count(self.view, state)
        if state.cursor is None:
            start = count if pane.tail else -1
            at = start + by if (by < 0) == pane.tail else (count - 1 if by > 0 else 0)
        else:
            at = state.cursor + by
        self._choose(cursor=max(0, min(count - 1, at)) if count else None)

    def action_back(self) -> None:
        """One thing at a time: the mark, the filter, the whole screen, and then the focus."""
        if self.view.focus != CURVES:
            state = self._pane()[1]
            if state.cursor is not None:
                return self._choose(cursor=None)
            if state.filter:
                return self._choose(filter="")
        elif self.view.at is not None:
            return self.look(at=None)
        if self.view.full:
            return self.look(full=False)
        return self.look(focus=CURVES)

    def action_filter(self) -> None:
        if self.view.focus == CURVES:
            return self.say("the curves have no filter; Tab or a digit goes to a pane that has")
        _, state = self._pane()
        dialog = Text("show only", self.view, text=["Entries with this text in them; nothing shows all."],
                      default=state.filter, hint="Enter filter   Esc close")  # fmt: skip
        self.app.push_screen(
            dialog,
            lambda text: self._choose(filter=text, cursor=None) if text is not None else None,
        )

    def action_open(self) -> None:
        if self.view.focus == CURVES:
            return
        pane, state = self._pane()
        if state.cursor is None:
            self.action_move(1)
            state = self._pane()[1]
        if pane.step is not None and (step := pane.step(self.view, state)) is not None:
            self.go_to(step)
        if pane.detail is not None and pane.detail(self.view, 80, 24, state):
            detail = pane.detail
            self.app.push_screen(
                Pager(
                    pane.name,
                    self.view,
                    lambda view, width, height: detail(view, width, height, state),
                )
            )

    # -- zoom, pan and the value cursor

    def _scale(self) -> XScale:
        shown = next((chart.size.width for chart in self._charts if chart.display), self.size.width)
        return axis.make_x_scale(self.view, max(8, shown - GUTTER))

    def action_zoom(self, factor: float, about: float | None = None) -> None:
        """About a place of the axis, else about the value cursor; else the newest step stays in
        sight.
        """
        scale, whole = self._scale(), axis.axis_end(self.view) - axis.axis_start(self.view)
        span = max(axis.shortest_span(self.view), scale.per_dot * scale.dots * factor)
        if span >= whole:
            return self.look(span=None, end=None)
        if about is None and self.view.at is not None:
            return self.look(span=span, end=self._place(self.view.at) + span / 2)
        if about is not None:
            share = (about - scale.first) / (scale.per_dot * scale.dots)
            return self.look(span=span, end=self._until(about + (1 - share) * span))
        return self.look(span=span)

    def action_pan(self, share: float) -> None:
        if self.view.span is None:
            return self.say("the whole run is in sight; + shows less of it")
        scale = self._scale()
        width = scale.per_dot * scale.dots
        end = (axis.axis_end(self.view) if self.view.end is None else self.view.end) + share * width
        self.look(end=self._until(max(axis.axis_start(self.view) + width, end)))

    def _until(self, end: float) -> float | None:
        """Where a stretch ends; one that reaches the newest step follows it."""
        return None if end >= axis.axis_end(self.view) else end

    def action_follow(self) -> None:
        self.look(end=None, at=None)

    def _place(self, step: float) -> float:
        return self.view.snapshot.series.place(step, axis.shown_axis(self.view))

    def _step_at(self, x: float) -> float:
        """The step at a place of the axis."""
        series = self.view.snapshot.series
        return max(1.0, min(series.last_step, round(series.step_at(x, axis.shown_axis(self.view)))))

    def action_cursor(self, cells: int) -> None:
        """Move the value cursor; it begins at the newest step, and draws the stretch along."""
        if self.view.focus != CURVES:
            return
        now, last = self.view.at, self.view.snapshot.series.last_step
        if now is None:
            return self.go_to(last)
        there = self._step_at(self._place(now) + cells * 2 * self._scale().per_dot)
        by = 1 if cells > 0 else -1
        self.go_to(max(1.0, min(last, there if (there - now) * by > 0 else now + by)))

    def action_event(self, by: int) -> None:
        """Put the value cursor on the nearest thing that is marked."""
        last = self.view.snapshot.series.last_step
        step = axis.next_marked_step(
            self.view, last + 1 if self.view.at is None else self.view.at, by
        )
        if step is None:
            return self.say(f"nothing is marked {'after' if by > 0 else 'before'} this")
        self.go_to(max(1.0, min(last, step)))

    def go_to(self, step: float) -> None:
        """Put the value cursor on a step, and bring it into sight."""
        self.view = replace(self.view, at=step)
        scale, place = self._scale(), self._place(step)
        if scale.first <= place < scale.last:
            return self.look(at=step)
        self.look(end=self._until(place + scale.per_dot * scale.dots / 2))

    # -- what is drawn, and how

    def action_smooth(self) -> None:
        smooth = (self.view.smooth + 1) % len(SMOOTHINGS)
        self.look(smooth=smooth)
        self.say(f"smoothing {SMOOTHINGS[smooth]}", "accent")

    def action_axis(self) -> None:
        """The next axis; what was chosen of the old one is none of the new one's."""
        chosen = AXES[(AXES.index(self.view.axis) + 1) % len(AXES)]
        self.look(axis=chosen, span=None, end=None)
        self.say(f"curves by {chosen}", "accent")

    def action_signals(self) -> None:
        """Choose what is drawn; each choice shows at once."""
        known = tuple(
            dict.fromkeys((*self.view.charts, *choosable_signals(self.view.snapshot.columns)))
        )

        def options() -> list[tuple[Row, str]]:
            return [(_signal_row(self.view, name), "") for name in known]

        def toggle(index: int) -> None:
            name, charts = known[index], self.view.charts
            charts = tuple(n for n in charts if n != name) if name in charts else (*charts, name)
            if charts:
                self.look(
                    charts=charts, big=self.view.big if self.view.big in charts else charts[0]
                )

        self.app.push_screen(Toggle("curves", self.view, options=options, toggle=toggle))

    def _pane(self) -> tuple[Pane, PaneState]:
        pane = BY_NAME[self.view.focus]
        return pane, self.view.state(pane.name)

    def _choose(self, **changes: object) -> None:
        """Change what is chosen in the focused pane."""
        pane, state = self._pane()
        self.look(states={**self.view.states, pane.name: replace(state, **changes)})  # type: ignore[arg-type]

    def action_help(self) -> None:
        self.app.push_screen(
            Pager("keys and signs", self.view, lambda view, width, height: keys.help_rows(width))
        )

    def action_journal(self) -> None:
        def rows(view: View, width: int, height: int) -> Sequence[Row]:
            lines = view.snapshot.story.lines
            return [line for event in lines for line in log_rows(event, width)] or [
                ((" nothing yet", "dim"),)
            ]

        self.app.push_screen(Pager("journal", self.view, rows, tail=True))

    def action_commands(self) -> None:
        """The palette: every key of the table by its words."""
        if self.app.screen is not self:
            return
        known = [key for key in keys.KEYS if key.action != "commands"]

        def done(index: int | None) -> None:
            if index is not None:
                self.call_later(self.run_action, known[index].action)

        labels: list[Row] = [((f"{key.shown:>10}  ", "key"), (key.help, "plain")) for key in known]
        self.app.push_screen(
            Palette("commands", self.view, options=[(label, "") for label in labels]), done
        )

    def action_theme(self) -> None:
        name = self.app.next_theme() if isinstance(self.app, ThemedApp) else ""
        kept = f"theme {name} (GUARDRAIL_THEME={name} keeps it)"
        self.say(
            kept if name else "this terminal has its own few colours, and no other theme", "accent"
        )

    def action_leave(self) -> None:
        self.app.exit(return_code=0)

    # -- the mouse

    def on_click(self, event: Click) -> None:
        """A click gives the keys to what was clicked; it never sends anything.

        On an entry it marks it, and the curves jump there; on the enlarged chart it puts the value
        cursor.
        """
        widget = event.widget
        if isinstance(widget, PaneLines):
            self.look(focus=widget.pane.name)
            row = event.screen_y - widget.region.y
            index = entry_of_row(widget.rows[row]) if 0 <= row < len(widget.rows) else None
            if index is not None:
                self._choose(cursor=index)
                pane, state = self._pane()
                if pane.step is not None and (step := pane.step(self.view, state)) is not None:
                    self.go_to(step)
        elif isinstance(widget, Chart):
            was_big = widget.signal == self.view.big
            self.look(focus=CURVES, big=widget.signal)
            if was_big and (place := self._pointed(event)) is not None:
                self.go_to(self._step_at(place))

    def _pointed(self, event: MouseEvent) -> float | None:
        """The place of the axis under the mouse."""
        chart = event.widget
        if not isinstance(chart, Chart):
            return None
        cell = event.screen_x - chart.region.x - GUTTER
        scale = self._scale()
        return scale.first + (2 * cell + 1) * scale.per_dot if 0 <= cell < scale.dots // 2 else None

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self._wheel(event, -1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self._wheel(event, 1)

    def _wheel(self, event: MouseEvent, by: int) -> None:
        """Zoom the curves about the mouse; walk through the entries of a list."""
        widget = event.widget
        if isinstance(widget, Chart):
            self.action_zoom(1.5 if by > 0 else 1 / 1.5, self._pointed(event))
        elif isinstance(widget, PaneLines):
            self.look(focus=widget.pane.name)
            self.action_move(by)


def _in_sight(view: View, charts: int) -> Sequence[str]:
    """The signals that have a chart: the first ones, the enlarged one always."""
    first = view.charts[: min(charts, SLOTS)]
    return first if view.big in first or not first else (*first[:-1], view.big)


def _signal_row(view: View, name: str) -> Row:
    value = view.snapshot.series.last(name)
    told = format_short(value) if value is not None else ""
    on = name in view.charts
    return (
        (("✓ " if on else "· "), "good" if on else "dim"),
        (f"{signal_label(name):<42}", "plain"),
        (told, "dim"),
    )
