"""Start-up and refresh of the screen.

A frame is drawn twice a second, or five times a second while something happens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Event, InputEvent, Key
from textual.message import Message
from textual.message_pump import MessagePump

from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.reader import Reader
from guardrail.tui.model.recorded_reader import Recorded, RecordedReader
from guardrail.tui.model.run_reader import RunReader
from guardrail.tui.model.sent_commands import SentCommands
from guardrail.tui.model.view import Snapshot, View
from guardrail.tui.screens.dashboard import Dashboard
from guardrail.tui.screens.dialog import Dialog
from guardrail.tui.terminal import hangup as terminal
from guardrail.tui.terminal.key_queue import NOW, KeyQueue
from guardrail.tui.terminal.themed_app import ThemedApp

# between two frames while something happens to the run, or the viewer does something
FRAME_SECONDS = 0.2
QUIET_SECONDS = 0.5  # ... and while only a few rows come
TICK_SECONDS = 1.0  # between two frames without news: ages grow all the same
LIVELY_SECONDS = 5.0  # how long frames come faster after something has happened


class GuardrailApp(ThemedApp[None]):
    """The screen of one run.

    Args:
        reader: where snapshots come from and commands go.
        clock: wall time.
        read_only: control keys only show that they do nothing.
        theme: one of `palette.THEMES`; None: what suits the terminal.
    """

    CSS_PATH = "screen.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c,ctrl+q", "quit", "leave", show=False, priority=True)
    ]

    class Fresh(Message):
        """The reader has a new snapshot. At most one message waits: `latest` has all the news."""

    def __init__(
        self,
        reader: Reader,
        *,
        clock: Callable[[], float] = time.time,
        read_only: bool = False,
        theme: str | None = None,
    ) -> None:
        super().__init__(theme)
        self._reader, self._clock, self._read_only = reader, clock, read_only
        self._under_way = False
        self._drawn, self._happened = -math.inf, -math.inf  # monotonic seconds
        self._monotonic = time.monotonic
        self._shown = reader.latest()
        self._commands = SentCommands(reader, clock)
        self._keys = KeyQueue(super().on_event, self._takes, self._busy)

    def get_default_screen(self) -> Dashboard:
        return Dashboard(self._view(), self._commands)

    def on_mount(self) -> None:
        self.set_interval(TICK_SECONDS / 2, self._tick)
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

    async def on_event(self, event: Event) -> None:
        if isinstance(event, InputEvent):
            self._happened = self._monotonic()
        if isinstance(event, Key) and not event.is_forwarded:
            await self._keys.press(event)
        else:
            await super().on_event(event)

    def _takes(self, key: Key) -> str:
        """Return what is done with a key; only a dialog may not take it at once."""
        top = self.screen
        return top.takes(key) if isinstance(top, Dialog) else NOW

    def _busy(self) -> Iterable[MessagePump]:
        """Return the parts that a key may give something to do.

        These are the focused part, the parts around it, and the screen below a dialog.
        """
        target = self.focused or self.screen
        return [*target.ancestors_with_self, self, *self.screen_stack[:1], self]

    def on_guardrail_app_fresh(self) -> None:
        wait = self._drawn + self._pace() - self._monotonic()
        if wait > 0:
            self.set_timer(wait, self._draw)
        else:
            self._draw()

    def _pace(self) -> float:
        """Return the seconds between two frames."""
        latest = self._reader.latest()
        if not latest.loaded or _news(self._shown, latest):
            self._happened = self._monotonic()
        is_lively = self._monotonic() - self._happened < LIVELY_SECONDS
        return FRAME_SECONDS if is_lively else QUIET_SECONDS

    def _tick(self) -> None:
        if self._monotonic() - self._drawn >= TICK_SECONDS - FRAME_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._under_way = False
        self._drawn, self._shown = self._monotonic(), self._reader.latest()
        self._show()

    def _show(self) -> None:
        # A timer may fire once more while the screens are being removed.
        for dashboard in self.screen_stack[:1]:
            if isinstance(dashboard, Dashboard):
                dashboard.show(self._view())


def _news(before: Snapshot, now: Snapshot) -> bool:
    """Return whether more is new than a few rows and a later heartbeat."""
    if before is now:
        return False
    return before.story is not now.story or _visible_state(before) != _visible_state(now)


def _visible_state(one: Snapshot) -> tuple[object, ...]:
    """Return what of a snapshot is drawn at once when it changes, but for the story."""
    state: tuple[object, ...] = ()
    if one.status is not None:
        state = (one.status.phase, one.status.mode, one.status.question, one.status.disk)
    return (
        one.problem,
        one.recorded,
        one.looking_up,
        one.unsent,
        one.previews,
        one.columns,
        one.series.details,
        len(one.series.abandoned),
        state,
    )


def run_screen(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    theme: str | None = None,
    mouse: bool = True,
) -> int:
    """Show a run until the viewer leaves; return 0. Training is not affected.

    Args:
        theme: one of `guardrail.cli.theme_names.THEMES`; None: what suits the terminal.
        mouse: ask the terminal for the mouse. Without it, the mouse selects text.

    Raises:
        RunDirectoryError: there is no run at `path`.
    """
    run = RunDirectory.open(Path(path))
    app = GuardrailApp(RunReader(run, present=not read_only), read_only=read_only, theme=theme)
    return _run(app, mouse=mouse)


def run_log(log: Recorded, *, theme: str | None = None, mouse: bool = True) -> int:
    """Show a recorded log until the viewer leaves; return 0."""
    return _run(GuardrailApp(RecordedReader(log), read_only=True, theme=theme), mouse=mouse)


def _run(app: GuardrailApp, *, mouse: bool) -> int:
    with terminal.guarded():
        app.run(mouse=mouse)
    return app.return_code or 0
