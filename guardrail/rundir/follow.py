"""What is new in a run directory since the last look: for the headless printer, TensorBoard and the
screen.

Each look reads only what was added. Nothing here is written, and a run that has no file yet is
merely quiet.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
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

POLL_SECONDS = 0.25  # between two looks where no notice comes: on a shared file system
CHECK_SECONDS = 1.0  # between two looks all the same where notices come
# changes found without a notice, in a row, after which notices are no longer believed in
_MISSED = 3


@dataclass(frozen=True)
class Update:
    """Events and metric rows [first, last) that came since the last look."""

    events: list[Event]
    rows: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.events) or self.rows[0] < self.rows[1]


class Follower:
    """An incremental reader of one run; cheap to make, and to look with when nothing happened.

    Args:
        run: the run directory.
        seq: events up to this one are known already.
        row: metric rows before this one are known already.
        most: rows that one look takes at most; the next look takes the next ones. None: all that
        are new.

    Attributes:
        timelines: which rows are the present, from all events and rows seen so far; for
        `MetricsView.current`.
        view: the rows as of the last look.
        fresh: with `most`, the rows that the last look took, read and not mapped; float64 [rows,
        columns].
        complete: the last look took all that there was.
        unreadable: complete lines of the journal that are no events.
        cut: which file has lost what was read of it already: "journal.jsonl", "metrics.bin" or "".
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
        self._learnt = 0  # rows that `timelines` has seen
        self._offset = 0  # bytes of the journal that have been read
        self._signature: tuple[int, ...] = ()
        self._watch: _Watch | None = None
        self._can_watch = True
        self._missed = 0

    def poll(self) -> Update:
        """What is new. Events first: a row never belongs to a timeline whose beginning was not seen
        before.

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
            # what the journal says is not lost with the rows
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
        # One row further back, so that a change of the timeline right here is seen.
        back = max(0, min(self._learnt, first) - 1)
        rows = view.array[back:end]
        if self._most is not None:
            _, rows = self._run.rows(back, end)
            end = last = max(first, back + len(rows))  # fewer where the file was cut since
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
        """Sleep until journal, metrics or status change, at most `timeout` seconds; True if they
        did.

        Through inotify where it works; where it does not (no watchdog, no watches left, a shared
        file system), by looking at sizes and times.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _events(self) -> list[Event]:
        """Complete lines behind the offset; a torn last line waits for its rest."""
        try:
            with open_file(self._run.journal_path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    self.cut = self.cut or "journal.jsonl"
                    self._offset = self.unreadable = (
                        # the folder was restored from a copy; known events are passed over by seq
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
                # No watchdog, no inotify instances left, a system without: each is a reason to
                # poll, not to stop.
                self._can_watch = False

    def _miss(self) -> None:
        self._missed += 1
        if self._missed >= _MISSED:
            self._can_watch = False
            self.close()


class _Watch:
    """watchdog on the run folder itself; imported when first waited for."""

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
