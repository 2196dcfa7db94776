"""Start-up and wiring of the screen: reader -> two frames a second, or five while something happens
-> dashboard.
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

# between two frames while something happens: to the run, or by the viewer's hand
FRAME_SECONDS = 0.2
QUIET_SECONDS = 0.5  # ... and while there is nothing new but a few rows more
TICK_SECONDS = 1.0  # ages and silence grow without news
LIVELY_SECONDS = 5.0  # after the last thing that happened


class GuardrailApp(ThemedApp[None]):
    """The screen of one run.

    Args:
        reader: where snapshots come from and commands go.
        clock: wall time.
        read_only: control keys only say that they do nothing.
        theme: one of `palette.THEMES`; None: what suits the terminal.
    """

    CSS_PATH = "screen.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c,ctrl+q", "quit", "leave", show=False, priority=True)
    ]

    class Fresh(Message):
        """The reader has something new. At most one is under way: what came meanwhile is in
        `latest` too.
        """

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
        self._drawn, self._happened = -math.inf, -math.inf  # by the clock that never goes back
        self._monotonic = time.monotonic
        self._shown = reader.latest()
        self._commands = SentCommands(reader, clock)
        self._typing = KeyQueue(super().on_event, self._takes, self._busy)

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
            await self._typing.press(event)
        else:
            await super().on_event(event)

    def _takes(self, key: Key) -> str:
        """What whoever has the keys does with one: only a dialog does not take each at once."""
        top = self.screen
        return top.takes(key) if isinstance(top, Dialog) else NOW

    def _busy(self) -> Iterable[MessagePump]:
        """Whoever may have to do with a key: what has it, what holds that, and what has opened the
        dialog on top.
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
        """Seconds between two frames: more of them where there is something to see than all day
        long.
        """
        latest = self._reader.latest()
        if not latest.loaded or _news(self._shown, latest):
            self._happened = self._monotonic()
        return (
            FRAME_SECONDS if self._monotonic() - self._happened < LIVELY_SECONDS else QUIET_SECONDS
        )

    def _tick(self) -> None:
        if self._monotonic() - self._drawn >= TICK_SECONDS - FRAME_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._under_way = False
        self._drawn, self._shown = self._monotonic(), self._reader.latest()
        self._show()

    def _show(self) -> None:
        # A timer may fire once more while the screens are being taken down.
        for dashboard in self.screen_stack[:1]:
            if isinstance(dashboard, Dashboard):
                dashboard.show(self._view())


def _news(before: Snapshot, now: Snapshot) -> bool:
    """Whether there is more to see than a few rows more and a later heartbeat."""
    if before is now:
        return False
    if before.story is not now.story:
        return True
    told = [
        (one.problem, one.recorded, one.looking_up, one.unsent, one.previews, one.columns,
         one.series.details, len(one.series.abandoned),
         one.status and (one.status.phase, one.status.mode, one.status.question, one.status.disk))
        for one in (before, now)
    ]  # fmt: skip
    return told[0] != told[1]


def run_screen(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    theme: str | None = None,
    mouse: bool = True,
) -> int:
    """Show a run until the viewer leaves; returns 0. Training never notices.

    Args:
        theme: one of `guardrail.cli.theme_names.THEMES`; None: what suits the terminal.
        mouse: ask the terminal for the mouse; without, it selects text as everywhere else.

    Raises:
        RunDirectoryError: there is no run at `path`.
    """
    run = RunDirectory.open(Path(path))
    app = GuardrailApp(RunReader(run, present=not read_only), read_only=read_only, theme=theme)
    return _run(app, mouse=mouse)


def run_log(log: Recorded, *, theme: str | None = None, mouse: bool = True) -> int:
    """Show a recorded log until the viewer leaves; returns 0."""
    return _run(GuardrailApp(RecordedReader(log), read_only=True, theme=theme), mouse=mouse)


def _run(app: GuardrailApp, *, mouse: bool) -> int:
    with terminal.guarded():
        app.run(mouse=mouse)
    return app.return_code or 0
