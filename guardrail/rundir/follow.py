"""Incremental reading of a run directory, for the headless printer, TensorBoard and the screen.

Each poll reads only what was added since the last one. Nothing is written. A run that has no files
yet has nothing new.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guardrail.core.errors import RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.files import open_file
from guardrail.decide.timelines import TimelineIndex
from guardrail.rundir import journal
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

POLL_SECONDS = 0.25  # between two checks without inotify, as on a shared file system
CHECK_SECONDS = 1.0  # between two checks with inotify, in case a notification is missing
# consecutive changes without a notification after which inotify is no longer used
_MISSED = 3


@dataclass(frozen=True)
class Update:
    """Events and metric rows [first, last) that were added since the last poll."""

    events: list[Event]
    rows: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.events) or self.rows[0] < self.rows[1]


class Follower:
    """An incremental reader of one run. A poll without changes is cheap.

    Args:
        run: the run directory.
        seq: events up to this one are known already.
        row: metric rows before this one are known already.
        most: largest number of rows per poll; the next poll reads the next ones. None: no limit.

    Attributes:
        timelines: which rows are the present ones, from all events and rows read so far; for
            `MetricsView.current`.
        view: the rows at the last poll.
        fresh: with `most`, the rows of the last poll, read and not mapped; float64 [rows, columns].
        complete: the last poll read everything.
        unreadable: number of complete lines of the journal that are not events.
        cut: the file that became shorter than what was read of it: "journal.jsonl", "metrics.bin"
            or "".
    """

    def __init__(
        self, run: RunDirectory, *, seq: int = 0, row: int = 0, most: int | None = None
    ) -> None:
        self._run = run
        self._most = most
        self.seq = seq
        self.row = row
        self.timelines = TimelineIndex()
        self.view: MetricsView | None = None
        self.fresh: np.ndarray | None = None
        self.complete = True
        self.unreadable = 0
        self.cut = ""
        self._learnt = 0  # rows that `timelines` contains
        self._offset = 0  # bytes of the journal that have been read
        self._signature: tuple[int, ...] = ()
        self._watch: _Watch | None = None
        self._can_watch = True
        self._missed = 0

    def poll(self) -> Update:
        """Return what is new.

        Events are read first, so the start of a timeline is known before its rows.

        Raises:
            OSError, RunDirectoryError: the metrics cannot be read, and there is no new event.
        """
        self._signature = self._now()
        events = self._events()
        self.timelines.add_events(events)
        fresh = [event for event in events if event.seq > self.seq]
        self.seq = max((event.seq for event in fresh), default=self.seq)
        try:
            return Update(fresh, self._new_rows())
        except (OSError, RunDirectoryError):
            if not fresh:
                raise
            self.complete = False
            # the events are returned even if the rows cannot be read
            return Update(fresh, (self.row, self.row))

    def _new_rows(self) -> tuple[int, int]:
        view = self._run.metrics()
        if len(view) < self.row:
            self.cut = self.cut or "metrics.bin"
        first, last = self.row, max(self.row, len(view))
        if self._most is not None:
            last = min(last, first + self._most)
        self.complete = last >= len(view)
        end = len(view) if self._most is None else last
        # One row more at the start, to find a change of the timeline between both rows.
        back = max(0, min(self._learnt, first) - 1)
        rows = view.array[back:end]
        if self._most is not None:
            _, rows = self._run.rows(back, end)
            end = last = max(first, back + len(rows))  # fewer if the file was cut meanwhile
            self.fresh = rows[first - back :]
        if self._learnt < end:
            part, known = (
                MetricsView(view.columns, rows, lambda: self.timelines),
                max(0, self._learnt - 1),
            )
            steps, timelines = (
                part.column("step")[known - back :],
                part.column("timeline")[known - back :],
            )
            self.timelines.add_rows(steps, timelines, from_start=known == 0)
            self._learnt = end
        self.view = view
        self.row = last
        return first, last

    def wait(self, timeout: float) -> bool:
        """Wait until journal, metrics or status change; return whether they did.

        Waits at most `timeout` seconds. It uses inotify where that works. Without it (no watchdog,
        no watches left, a shared file system) it compares sizes and times of the files.
        """
        deadline = time.monotonic() + timeout
        self._start_watch()
        while True:
            if self._changed():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._watch is None:
                time.sleep(min(left, POLL_SECONDS))
            elif self._watch.wait(min(left, CHECK_SECONDS)):
                self._missed = 0
            elif self._changed():
                self._miss()
                return True

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _events(self) -> list[Event]:
        """Return the events of the complete lines after the offset.

        An incomplete last line is read later.
        """
        try:
            with open_file(self._run.journal_path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    self.cut = self.cut or "journal.jsonl"
                    self._offset = self.unreadable = (
                        # the folder was restored from a copy; `poll` drops known events by seq
                        0
                    )
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        events, used, unreadable = journal.parse_counted(data)
        self._offset += used
        self.unreadable += unreadable
        return events

    def _now(self) -> tuple[int, ...]:
        signature: list[int] = []
        for name in ("journal.jsonl", "metrics.bin", "status.json"):
            try:
                info = os.stat(self._run.path / name)
                signature += (info.st_size, info.st_mtime_ns, info.st_ino)
            except OSError:
                signature += (0, 0, 0)
        return tuple(signature)

    def _changed(self) -> bool:
        return self._now() != self._signature

    def _start_watch(self) -> None:
        if self._watch is None and self._can_watch:
            try:
                self._watch = _Watch(self._run)
            except Exception:
                # No watchdog, no inotify instances left, or a system without inotify: poll instead.
                self._can_watch = False

    def _miss(self) -> None:
        self._missed += 1
        if self._missed >= _MISSED:
            self._can_watch = False
            self.close()


class _Watch:
    """watchdog on the run folder. It is imported at the first wait."""

    def __init__(self, run: RunDirectory) -> None:
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        noticed = threading.Event()

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: Any) -> None:
                if event.event_type in ("modified", "created", "moved", "deleted"):
                    noticed.set()

        self._noticed = noticed
        self._observer = Observer()
        self._observer.daemon = True
        self._observer.schedule(Handler(), str(run.path), recursive=False)
        self._observer.start()

    def wait(self, seconds: float) -> bool:
        noticed = self._noticed.wait(seconds)
        self._noticed.clear()
        return noticed

    def close(self) -> None:
        self._observer.stop()
        with contextlib.suppress(RuntimeError):
            self._observer.join(timeout=5)
