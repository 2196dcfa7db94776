"""An app whose colours are one of the themes; the terminal is sent what it can show, and only what
changed.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TypeVar

from rich.console import RenderableType
from textual._compositor import ChopsUpdate
from textual.app import App
from textual.driver import Driver
from textual.screen import Screen

from guardrail.tui.draw import palette
from guardrail.tui.terminal.cell_diff import CellUpdate

T = TypeVar("T")


class ThemedApp(App[T]):
    """Args:
    theme: one of `palette.THEMES`. None: dark, and the terminal's own colours where it has few.
    """

    ENABLE_COMMAND_PALETTE = False
    ALLOW_SELECT = False  # what is selected would go to the clipboard by OSC 52

    def __init__(self, theme: str | None = None) -> None:
        super().__init__()
        for known in palette.OURS:
            self.register_theme(known)
        # Without colour, or with sixteen, the terminal's own colours are the right ones.
        self.few = self.no_color or self.console.color_system in (None, "standard")
        self.theme = (
            palette.TERMINAL if self.few else palette.THEMES.get(theme or "", palette.OURS[0].name)
        )
        if self.no_color:
            self._strip_colours()

    def on_mount(self) -> None:
        """After a stop (Ctrl-Z, SIGSTOP) the terminal shows nothing of the screen: draw all of
        it.
        """
        resume = signal.getsignal(signal.SIGCONT)
        if not callable(resume):
            return  # without a terminal nothing of textual's waits for it

        def draw_all(number: int, frame: FrameType | None) -> None:
            _end_key_thread(self._driver)
            resume(number, frame)
            self.call_later(self.screen.refresh)

        signal.signal(signal.SIGCONT, draw_all)

    def _strip_colours(self) -> None:
        """Textual chose its filter by the theme that was there before ours; greys are colours
        too.
        """
        from textual.filter import Monochrome, NoColor

        self._filters = [NoColor() if isinstance(f, Monochrome) else f for f in self._filters]

    def _display(self, screen: Screen[object], renderable: RenderableType | None) -> None:
        """The one way to the terminal. Whole frames are textual's own business."""
        super()._display(
            screen, CellUpdate(renderable) if isinstance(renderable, ChopsUpdate) else renderable
        )

    def next_theme(self) -> str:
        """Go on to the next theme; returns its name, "" where the terminal shows no other."""
        if self.few:
            return ""
        names = list(palette.THEMES)
        now = list(palette.THEMES.values()).index(self.theme)
        name = names[(now + 1) % len(names)]
        self.theme = palette.THEMES[name]
        return name


def _end_key_thread(driver: Driver | None) -> None:
    """End the thread that reads keys, where a stop has left it alive.

    Ctrl-Z ends it before the process stops; SIGSTOP, which nothing can catch, does not. Textual
    then starts a second one when the process goes on. Of the two, one would wait for a key for
    ever, and the screen could not be left.
    """
    thread = getattr(driver, "_key_thread", None)
    exit_event = getattr(driver, "exit_event", None)
    if thread is None or exit_event is None or not thread.is_alive():
        return
    exit_event.set()
    thread.join()  # it looks at the event ten times a second
    exit_event.clear()
