"""Reads a recorded log and publishes snapshots: its rows at once, then the controller's findings as
they come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from guardrail.core.events.event import Event
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.tui.model.failures import format_reason
from guardrail.tui.model.latest_snapshot import LatestSnapshot
from guardrail.tui.model.run_story import StoryBuilder
from guardrail.tui.model.view import Snapshot
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.series import AXES, choosable_signals

REFUSAL = "a recorded log takes no commands"
SHOW_SECONDS = 0.5  # between two snapshots while the log is judged


class Part(Protocol):
    """Some rows, in order; see `guardrail.backtest.recorded_run.Part`."""

    @property
    def rows(self) -> np.ndarray: ...
    @property
    def missing(self) -> np.ndarray: ...
    @property
    def events(self) -> list[Event]: ...


class Recorded(Protocol):
    """What the screen uses of `guardrail.backtest.recorded_run.RecordedRun`.

    The screen must not import the controller.
    """

    name: str
    format: str
    columns: Sequence[str]
    last_step: int

    def __len__(self) -> int: ...
    def plain_parts(self) -> Iterable[Part]: ...
    def judged_parts(self) -> Iterable[Part]: ...


class RecordedReader:
    """Reads one log to its end, in a thread. It writes nothing."""

    def __init__(self, log: Recorded) -> None:
        self._log = log
        status = Status(run=log.name, phase=Phase.FINISHED, step=log.last_step, mode=Mode.ADVISE)
        snapshot = Snapshot(log.name, status=status, loaded=False, recorded=self._describe(0))
        self._latest = LatestSnapshot(snapshot)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._read, name="guardrail-log", daemon=True)

    def start(self, notify: Callable[[], None]) -> None:
        self._latest.notify = notify
        self._thread.start()

    def latest(self) -> Snapshot:
        return self._latest.now

    def choose_signals(self, signals: tuple[str, ...], axis: str) -> None:
        """Do nothing: all signals of the log are kept already."""

    def request_rows(self, ranges: Sequence[tuple[float, float]]) -> None:
        """Do nothing: all rows are kept as they are."""

    def send(self, command: Command) -> None:
        self._latest.publish(unsent={**self._latest.now.unsent, command.id: REFUSAL})

    def preview(self, command: Command) -> None:
        from guardrail.operate.preview import Preview

        refused = Preview(command=command.kind, possible=False, refusal=REFUSAL)
        self._latest.publish(previews={**self._latest.now.previews, command.id: refused})

    def write_note(self, text: str) -> None:
        self._latest.publish(problem="the note is not written: a recorded log has no journal")

    def close(self) -> None:
        self._leaving.set()

    def join(self) -> None:
        """Wait until everything is judged; for tests and for measuring."""
        self._thread.join()

    def _read(self) -> None:
        try:
            self._show_rows()
            self._judge()
        # Every kind: the curves stay, and a thread that dies without a message looks like a slow
        # one.
        except Exception as error:
            problem = f"cannot judge the log: {format_reason(error)}"
            self._latest.publish(loaded=True, problem=problem)

    def _new_series(self) -> DecimatedSeries:
        axes = [axis for axis in AXES if axis in self._log.columns]
        return DecimatedSeries(choosable_signals(self._log.columns), axes)

    def _show_rows(self) -> None:
        rows = self._new_series()
        for part in self._log.plain_parts():
            rows.add(self._log.columns, part.rows, part.missing)
        columns = tuple(self._log.columns)
        self._latest.publish(series=rows.series(), columns=columns, loaded=True)

    def _judge(self) -> None:
        """Publish incidents as they are found, and the curves with bands when all is judged."""
        rows, builder = self._new_series(), StoryBuilder()
        done, shown, has_news = 0, time.monotonic(), False
        for part in self._log.judged_parts():
            if self._leaving.is_set():
                return
            rows.add(self._log.columns, part.rows, part.missing)
            builder.add(part.events)
            done += len(part.rows)
            has_news = has_news or bool(part.events)
            if time.monotonic() - shown >= SHOW_SECONDS:
                story = builder.story() if has_news else self._latest.now.story
                self._latest.publish(story=story, recorded=self._describe(done))
                shown, has_news = time.monotonic(), False
        recorded = self._describe(len(self._log))
        self._latest.publish(series=rows.series(), story=builder.story(), recorded=recorded)

    def _describe(self, done: int) -> str:
        total = len(self._log)
        text = f"recorded log of {total:,} rows ({self._log.format}), judged as in advise mode"
        if done < total:
            text += f": {100 * done // total} % done"
        return text
