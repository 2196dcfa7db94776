"""The keys of the panes: focus, entries, filter, and the pages that open over the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from guardrail.tui.draw.lines import Lines, Row
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.log import log_rows
from guardrail.tui.panes.pane import Pane
from guardrail.tui.panes.table import BY_NAME, CURVES, NAMES
from guardrail.tui.screens import keys
from guardrail.tui.screens.choice_dialogs import Palette
from guardrail.tui.screens.input_dialogs import Text
from guardrail.tui.screens.pager import Pager
from guardrail.tui.screens.screen_part import ScreenPart
from guardrail.tui.terminal.themed_app import ThemedApp


class PaneLines(Lines):
    """A pane on the screen; a click focuses it."""

    def __init__(self, pane: Pane[Any]) -> None:
        super().__init__(self._content, id=f"pane-{pane.name}", classes="pane")
        self.pane = pane

    def _content(self, view: View, width: int, height: int) -> Sequence[Row]:
        return self.pane.build(view, width, height, view.state(self.pane.name))


class PaneKeys(ScreenPart):
    """Part of the dashboard."""

    def action_pane(self, name: str) -> None:
        self.change_view(focus=name)

    def action_next_pane(self, by: int) -> None:
        self.change_view(focus=NAMES[(NAMES.index(self.view.focus) + by) % len(NAMES)])

    def action_full(self) -> None:
        self.change_view(full=not self.view.full)

    # -- entries

    def enlarge_other_chart(self, by: int) -> None:
        raise NotImplementedError

    def go_to(self, step: float) -> None:
        raise NotImplementedError

    def action_move(self, by: int) -> None:
        """Select another entry of the focused pane, or enlarge another chart."""
        if self.view.focus == CURVES:
            if abs(by) == 1:
                self.enlarge_other_chart(by)
            return
        pane, state = self.focused_pane()
        count = pane.count(self.view, state)
        if not count:
            return self.choose_in_pane(cursor=None)
        at = _first_entry(count, by, tail=pane.tail) if state.cursor is None else state.cursor + by
        self.choose_in_pane(cursor=max(0, min(count - 1, at)))

    def action_back(self) -> None:
        """Take back one choice: the cursor, else the filter, else the full screen, else focus."""
        if self.view.focus != CURVES:
            state = self.focused_pane()[1]
            if state.cursor is not None:
                return self.choose_in_pane(cursor=None)
            if state.filter:
                return self.choose_in_pane(filter="")
        elif self.view.at is not None:
            return self.change_view(at=None)
        if self.view.full:
            return self.change_view(full=False)
        return self.change_view(focus=CURVES)

    def action_filter(self) -> None:
        if self.view.focus == CURVES:
            return self.say("charts have no filter; Tab or a digit selects a pane")

        def filter_by(text: str | None) -> None:
            if text is not None:
                self.choose_in_pane(filter=text, cursor=None)

        dialog = Text(
            "filter",
            self.view,
            text=["Show entries that contain this text. An empty text shows all."],
            default=self.focused_pane()[1].filter,
            hint="Enter filter   Esc close",
        )
        self.app.push_screen(dialog, filter_by)

    def action_open(self) -> None:
        """Go to the step of the selected entry, and open its details."""
        if self.view.focus == CURVES:
            return
        pane, state = self.focused_pane()
        if state.cursor is None:
            self.action_move(1)
            state = self.focused_pane()[1]
        self.go_to_entry()
        if not pane.detail(self.view, 80, 24, state):
            return

        def rows(view: View, width: int, height: int) -> Sequence[Row]:
            return pane.detail(view, width, height, state)

        self.app.push_screen(Pager(pane.name, self.view, rows))

    def go_to_entry(self) -> None:
        """Move the cursor of the charts to the step of the selected entry, where it has one."""
        pane, state = self.focused_pane()
        step = pane.step(self.view, state)
        if step is not None:
            self.go_to(step)

    def focused_pane(self) -> tuple[Pane[Any], PaneState]:
        pane = BY_NAME[self.view.focus]
        return pane, self.view.state(pane.name)

    def choose_in_pane(self, **changes: object) -> None:
        """Replace fields of the state of the focused pane."""
        pane, state = self.focused_pane()
        changed = replace(state, **changes)  # type: ignore[arg-type]
        self.change_view(states={**self.view.states, pane.name: changed})

    # -- pages

    def action_help(self) -> None:
        def rows(view: View, width: int, height: int) -> Sequence[Row]:
            return keys.help_rows(width)

        self.app.push_screen(Pager("keys and symbols", self.view, rows))

    def action_journal(self) -> None:
        def rows(view: View, width: int, height: int) -> Sequence[Row]:
            found: list[Row] = []
            for line in view.snapshot.story.lines:
                found += log_rows(line, width)
            return found or [((" no events yet", "dim"),)]

        self.app.push_screen(Pager("journal", self.view, rows, tail=True))

    def action_commands(self) -> None:
        """Open the list of all keys; the one that is chosen is pressed."""
        if self.app.screen is not self:
            return
        known = [key for key in keys.KEYS if key.action != "commands"]

        def run_key(index: int | None) -> None:
            if index is not None:
                self.call_later(self.run_action, known[index].action)

        options: list[tuple[Row, str]] = []
        for key in known:
            label: Row = ((f"{key.shown:>10}  ", "key"), (key.help, "plain"))
            options.append((label, ""))
        self.app.push_screen(Palette("commands", self.view, options=options), run_key)

    def action_theme(self) -> None:
        name = self.app.next_theme() if isinstance(self.app, ThemedApp) else ""
        if name:
            self.say(f"theme {name} (GUARDRAIL_THEME={name} keeps it)", "accent")
        else:
            self.say("this terminal shows its own colours only: there is no other theme", "accent")

    def action_leave(self) -> None:
        self.app.exit(return_code=0)


def _first_entry(count: int, by: int, *, tail: bool) -> int:
    """Return the entry that a first move selects; it may lie outside of the list.

    Args:
        tail: the pane shows its last entries while none is selected.
    """
    if tail:
        return count + by if by < 0 else count - 1
    return 0 if by < 0 else by - 1
