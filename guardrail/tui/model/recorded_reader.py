"""A recorded log as snapshots: its rows at once, then what the controller says of them, as it says
it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from guardrail.core.errors import GuardrailError
from guardrail.core.events.event import Event
from guardrail.core.records import Command, Mode, Phase, Status
from guardrail.tui.model.run_story import StoryBuilder
from guardrail.tui.model.view import Snapshot
from guardrail.tui.numerics.decimated_series import DecimatedSeries
from guardrail.tui.numerics.series import AXES, choosable_signals

REFUSAL = "a recorded log takes no commands"
SHOW_SECONDS = 0.5  # between two looks of the screen at a judgement that goes on


class Part(Protocol):
    """Some rows, in order; see `guardrail.backtest.recorded_run.Part`."""

    @property
    def rows(self) -> np.ndarray: ...
    @property
    def missing(self) -> np.ndarray: ...
    @property
    def events(self) -> list[Event]: ...


class Recorded(Protocol):
    """What `guardrail.backtest.recorded_run.RecordedRun` is to the screen, which must not know the
    controller.
    """

    name: str
    format: str
    columns: Sequence[str]
    last_step: int

    def __len__(self) -> int: ...
    def plain(self) -> Iterable[Part]: ...
    def judged(self) -> Iterable[Part]: ...


class RecordedReader:
    """Reads one log to its end, on a thread of its own. Nothing is written anywhere."""

    def __init__(self, log: Recorded) -> None:
        self._log = log
        status = Status(run=log.name, phase=Phase.FINISHED, step=log.last_step, mode=Mode.ADVISE)
        self._latest = Snapshot(log.name, status=status, loaded=False, recorded=self._told(0))
        self._notify: Callable[[], None] = lambda: None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._read, name="guardrail-log", daemon=True)

    def start(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._thread.start()

    def latest(self) -> Snapshot:
        return self._latest

    def choose_signals(self, signals: tuple[str, ...], axis: str) -> None:
        """All that the log has is kept already."""

    def request_rows(self, ranges: Sequence[tuple[float, float]]) -> None:
        """And none of it is summed up."""

    def send(self, command: Command) -> None:
        self._publish(unsent={**self._latest.unsent, command.id: REFUSAL})

    def preview(self, command: Command) -> None:
        from guardrail.operate.preview import Preview

        told = Preview(command=command.kind, possible=False, refusal=REFUSAL)
        self._publish(previews={**self._latest.previews, command.id: told})

    def write_note(self, text: str) -> None:
        self._publish(trouble="the note is not written: a recorded log has no journal")

    def close(self) -> None:
        self._leaving.set()

    def join(self) -> None:
        """Wait until everything is judged; for tests and for measuring."""
        self._thread.join()

    def _read(self) -> None:
        try:
            self._show_rows()
            self._judge()
        except Exception as error:
            # Whatever it was, the curves stand, and a thread that dies without a word would look
            # like a slow one.
            known = isinstance(error, OSError | GuardrailError)
            reason = (
                (getattr(error, "strerror", None) or str(error))
                if known
                else f"{type(error).__name__}: {error}"
            )
            self._publish(loaded=True, trouble=f"cannot judge the log: {reason}")

    def _new_track(self) -> DecimatedSeries:
        return DecimatedSeries(
            choosable_signals(self._log.columns),
            [axis for axis in AXES if axis in self._log.columns],
        )

    def _show_rows(self) -> None:
        track = self._new_track()
        for part in self._log.plain():
            track.add(self._log.columns, part.rows, part.missing)
        self._publish(series=track.series(), columns=tuple(self._log.columns), loaded=True)

    def _judge(self) -> None:
        """The curves get their bands when all is judged; incidents are told as they are found."""
        track, builder = self._new_track(), StoryBuilder()
        done, shown, told = 0, time.monotonic(), True
        for part in self._log.judged():
            if self._leaving.is_set():
                return
            track.add(self._log.columns, part.rows, part.missing)
            builder.add(part.events)
            done, told = done + len(part.rows), told and not part.events
            if time.monotonic() - shown >= SHOW_SECONDS:
                news = {} if told else {"story": builder.story()}
                self._publish(recorded=self._told(done), **news)
                shown, told = time.monotonic(), True
        self._publish(
            series=track.series(), story=builder.story(), recorded=self._told(len(self._log))
        )

    def _told(self, done: int) -> str:
        total = len(self._log)
        share = f", {100 * done // total} % judged" if done < total else ""
        return f"a recorded log of {total:,} rows ({self._log.format}): what the guard would have said{share}"

    def _publish(self, **news: Any) -> None:
        self._latest = replace(self._latest, **news)
        self._notify()
