"""Start-up and wiring of the screen: reader -> at most five frames a second -> cockpit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message

from guardrail.rundir import RunDirectory
from guardrail.tui import palette, terminal
from guardrail.tui.cockpit import Cockpit
from guardrail.tui.controls import Desk
from guardrail.tui.reader import Reader, RunReader
from guardrail.tui.recorded import Recorded, RecordedReader
from guardrail.tui.view import View

FRAME_SECONDS = 0.2
TICK_SECONDS = 1.0  # ages and silence grow without news


class GuardrailApp(App[None]):
    """The screen of one run.

    Args:
        reader: where snapshots come from and commands go.
        clock: wall time.
        read_only: control keys only say that they do nothing.
    """

    CSS_PATH = "screen.tcss"
    ENABLE_COMMAND_PALETTE = False
    ALLOW_SELECT = False  # what is selected would go to the clipboard by OSC 52
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c,ctrl+q", "quit", "leave", show=False, priority=True)]

    class Fresh(Message):
        """The reader has something new. At most one is under way: what came meanwhile is in `latest` too."""

    def __init__(self, reader: Reader, *, clock: Callable[[], float] = time.time, read_only: bool = False) -> None:
        super().__init__()
        self._reader, self._clock, self._read_only = reader, clock, read_only
        self._under_way = False
        self._drawn = 0.0
        self._desk = Desk(reader, clock)
        self.register_theme(palette.THEME)
        # Without colour, or with sixteen, the terminal's own colours are the right ones.
        few = self.no_color or self.console.color_system in (None, "standard")
        self.theme = "ansi-dark" if few else palette.THEME.name
        if self.no_color:
            self._strip_colours()

    def _strip_colours(self) -> None:
        """Textual chose its filter by the theme that was there before ours; greys are colours too."""
        from textual.filter import Monochrome, NoColor

        self._filters = [NoColor() if isinstance(f, Monochrome) else f for f in self._filters]

    def get_default_screen(self) -> Cockpit:
        return Cockpit(self._view(), self._desk)

    def on_mount(self) -> None:
        self.set_interval(TICK_SECONDS, self._draw)
        self._reader.start(self._notify)

    def on_unmount(self) -> None:
        self._reader.close()

    def _view(self) -> View:
        return View(self._reader.latest(), self._clock(), read_only=self._read_only)

    def _notify(self) -> None:
        """Called on the reader's thread."""
        if not self._under_way:
            self._under_way = True
            self.post_message(self.Fresh())

    def on_guardrail_app_fresh(self) -> None:
        wait = self._drawn + FRAME_SECONDS - time.monotonic()
        if wait > 0:
            self.set_timer(wait, self._draw)
        else:
            self._draw()

    def _draw(self) -> None:
        self._under_way = False
        self._drawn = time.monotonic()
        # A timer may fire once more while the screens are being taken down.
        for cockpit in self.screen_stack[:1]:
            if isinstance(cockpit, Cockpit):
                cockpit.show(self._view())


def run_screen(path: str | os.PathLike[str], *, read_only: bool = False) -> int:
    """Show a run until the viewer leaves; returns 0. Training never notices.

    Raises:
        RunDirectoryError: there is no run at `path`.
    """
    run = RunDirectory.open(Path(path))
    return _run(RunReader(run, present=not read_only), read_only=read_only)


def run_log(log: Recorded) -> int:
    """Show a recorded log until the viewer leaves; returns 0."""
    return _run(RecordedReader(log), read_only=True)


def _run(reader: Reader, *, read_only: bool) -> int:
    app = GuardrailApp(reader, read_only=read_only)
    with terminal.guarded():
        app.run()
    return app.return_code or 0
