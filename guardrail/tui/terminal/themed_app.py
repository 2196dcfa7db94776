"""An app in one of the themes. The terminal is sent what it can show, and only what changed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TypeVar

from rich.console import RenderableType
from textual.app import App
from textual.driver import Driver
from textual.filter import LineFilter, Monochrome, NoColor
from textual.screen import Screen

from guardrail.tui.draw import palette
from guardrail.tui.terminal.cell_diff import send_cells_only

T = TypeVar("T")


class ThemedApp(App[T]):
    """An app with the themes of `palette`.

    Args:
        theme: one of `palette.THEMES`. None: dark, and the terminal's own colours where it has few.
    """

    ENABLE_COMMAND_PALETTE = False
    ALLOW_SELECT = False  # textual would copy a selection into the clipboard by OSC 52

    def __init__(self, theme: str | None = None) -> None:
        super().__init__()
        for known in palette.OURS:
            self.register_theme(known)
        # Without colour, or with sixteen, only the terminal's own colours look right.
        self.few = self.no_color or self.console.color_system in (None, "standard")
        if self.few:
            self.theme = palette.TERMINAL
        else:
            self.theme = palette.THEMES.get(theme or "", palette.OURS[0].name)
        if self.no_color:
            self._strip_colours()

    def on_mount(self) -> None:
        """Draw everything after a stop (Ctrl-Z, SIGSTOP): the terminal has lost the screen."""
        resume = signal.getsignal(signal.SIGCONT)
        if not callable(resume):
            return  # textual handles the signal only in a terminal

        def draw_all(number: int, frame: FrameType | None) -> None:
            _end_key_thread(self._driver)
            resume(number, frame)
            self.call_later(self.screen.refresh)

        signal.signal(signal.SIGCONT, draw_all)

    def _strip_colours(self) -> None:
        """Replace the filter that textual chose for the theme before ours: greys are colours too.

        `_filters` is private to textual. Where it is missing, textual's own filter stays.
        """
        filters: list[LineFilter] = getattr(self, "_filters", [])
        for at, line_filter in enumerate(filters):
            if isinstance(line_filter, Monochrome):
                filters[at] = NoColor()

    def _display(self, screen: Screen[object], renderable: RenderableType | None) -> None:
        """Write a frame to the terminal: all output goes through this private method of textual.

        A textual without it never calls this, and draws by itself.
        """
        super()._display(screen, send_cells_only(renderable))

    def next_theme(self) -> str:
        """Change to the next theme; return its name, "" where the terminal shows no other."""
        if self.few:
            return ""
        names = list(palette.THEMES)
        now = list(palette.THEMES.values()).index(self.theme)
        name = names[(now + 1) % len(names)]
        self.theme = palette.THEMES[name]
        return name


def _end_key_thread(driver: Driver | None) -> None:
    """End the thread that reads keys, where a stop has left it alive.

    Ctrl-Z ends it before the process stops; SIGSTOP, which no process can catch, does not. Textual
    then starts a second one when the process continues. Of the two, one would wait for a key for
    ever, and the screen could not be left.

    `_key_thread` and `exit_event` are private to textual's driver for Linux. Where one is missing,
    nothing is done.
    """
    thread = getattr(driver, "_key_thread", None)
    exit_event = getattr(driver, "exit_event", None)
    if thread is None or exit_event is None or not thread.is_alive():
        return
    exit_event.set()
    thread.join()  # it looks at the event ten times a second
    exit_event.clear()
