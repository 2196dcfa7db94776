"""Follows a run directory and feeds one tracker with what is new.

The sink knows the timelines: it drops rows that a rollback or a restart has discarded, and sends a
`Purge` where a tracker has written such rows already. It saves its position after each write, so a
new process continues there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from guardrail.core.errors import RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.files import FILE_MODE, FOLDER_MODE, read_file, replace_file
from guardrail.rundir.follow import Follower
from guardrail.rundir.metrics import MetricsView
from guardrail.trackers.base import Entry, NewConfig, Position, Purge, Row, Tracker

logger = logging.getLogger(__name__)

SECONDS = 2.0  # between two looks at the run directory
CHUNK_ROWS = 4096  # most rows of one write: bounds its memory
_NAP_SECONDS = 0.1  # between two looks at `stop`


def follow_run(
    tracker: Tracker, *, stop: Callable[[], bool] | threading.Event, seconds: float = SECONDS
) -> None:
    """Feed a tracker until `stop`, then write what is left and return. Meant for its own thread.

    A disk error is logged once and the write is tried again; it is not raised. If another process
    feeds this tracker, nothing is written.
    """
    is_stopped = stop.is_set if isinstance(stop, threading.Event) else stop
    with _hold_lock(tracker.folder) as is_alone:
        if not is_alone:
            logger.info("%s: another process writes the %s", tracker.run.path, tracker.output)
            return
        sink = Sink(tracker)
        while True:
            is_last = is_stopped()
            sink.try_write_new()
            if is_last:
                sink.close()
                return
            deadline = time.monotonic() + seconds
            while not is_stopped() and time.monotonic() < deadline:
                time.sleep(min(_NAP_SECONDS, seconds))


def write_once(tracker: Tracker) -> None:
    """Write what is in the run directory now, and return."""
    follow_run(tracker, stop=lambda: True)


@contextlib.contextmanager
def _hold_lock(folder: Path) -> Iterator[bool]:
    """Give True if no other process feeds the tracker of this folder.

    Where no lock is possible at all, as on a failed disk, there is nothing to protect: True.
    """
    descriptor = -1
    try:
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(folder / ".lock", flags, FILE_MODE)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_alone = True
    except BlockingIOError:
        is_alone = False
    except OSError as error:
        logger.warning("%s: %s", folder, error.strerror)
        is_alone = True
    try:
        yield is_alone
    finally:
        if descriptor >= 0:
            os.close(descriptor)


class Sink:
    """Feeds one tracker from its run directory. Only one at a time: `follow_run` holds a lock."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._run = tracker.run
        self._follower = Follower(self._run)
        self._position = _read_position(self._position_path)
        self._saved = self._position
        self._events: list[Event] = []  # read, and not yet written
        self._is_open = False
        self._has_begun = False  # this process has sent what replaces older points
        self._error = ""

    @property
    def _position_path(self) -> Path:
        return self._tracker.folder / "position.json"

    def try_write_new(self) -> None:
        """As `write_new`, but log a disk error instead: one line when it begins, one at its end."""
        output = self._tracker.output
        try:
            self.write_new()
        except (OSError, RunDirectoryError) as error:
            text = f"{output} cannot be written: {error}"
            if text != self._error:
                logger.warning("%s", text)
            self._error = text
        else:
            if self._error:
                logger.warning("%s are written again", output)
            self._error = ""

    def write_new(self) -> None:
        """Write all that is new. After an OSError only what was written counts as written."""
        self._events += self._follower.poll().events
        config = self._read_config()
        if not self._is_open:
            self._tracker.open(self._position)
            self._is_open = True
        while True:
            entries, position = self._next_entries(config)
            has_moved = position != self._position
            if not has_moved:
                entries = []
            self._tracker.write(entries)
            self._has_begun = self._has_begun or any(not isinstance(e, Event) for e in entries)
            self._position = position  # also if it cannot be saved now: the entries are written
            self._events = [event for event in self._events if event.seq > position.seq]
            if position != self._saved:
                replace_file(self._position_path, msgspec.json.encode(position))
                self._saved = position
            if not has_moved:
                return

    def close(self) -> None:
        self._follower.close()
        self._tracker.close()

    def _next_entries(self, config: str) -> tuple[list[Entry], Position]:
        """Return the next entries, and the position after them. Changes nothing."""
        old, timelines, view = self._position, self._follower.timelines, self._follower.view
        if view is None:  # the metrics could not be read yet
            return [], old
        first, last = old.rows, max(old.rows, min(len(view), old.rows + CHUNK_ROWS))
        builder = _EntryBuilder(timelines.begins, timeline=old.timeline)
        if not self._has_begun:
            first = self._begin_again(builder.entries, view, first)
        digest = old.config
        if config:
            digest = hashlib.sha256(config.encode()).hexdigest()
        if digest != old.config:
            builder.entries.append(NewConfig(config))
        for event in self._events:
            if event.seq > old.seq:
                builder.add_event(event)
        rows = view.array[first:last]
        steps, row_timelines = view.column("step")[first:last], view.column("timeline")[first:last]
        for row in rows[timelines.current(steps, row_timelines)].tolist():
            builder.add_row(dict(zip(view.columns, row, strict=True)))
        position = Position(
            rows=last,
            seq=self._follower.seq or old.seq,  # a journal that was cut begins again where it ends
            timeline=builder.timeline,
            config=digest,
        )
        return builder.entries, position

    def _begin_again(self, entries: list[Entry], view: MetricsView, first: int) -> int:
        """Void what an earlier process may have written after its last saved position.

        All rows of the step that comes next are written once more: the purge also removes those
        that had been saved. Returns the first row to write. TensorBoard's server ignores the first
        purge of a run, so a new run begins with one.
        """
        if first == 0:
            entries.append(Purge(0))
            return 0
        steps, is_current = view.column("step"), view.current(self._follower.timelines)
        unwritten = is_current[first:].nonzero()[0]
        if not len(unwritten):
            return first
        step = steps[first + int(unwritten[0])]
        entries.append(Purge(int(step)))
        written = (is_current[:first] & (steps[:first] >= step)).nonzero()[0]
        if len(written):
            return int(written[0])
        return first

    def _read_config(self) -> str:
        """Return the configuration without secrets, or "" while there is none."""
        try:
            return self._run.config_text(display=True)
        except RunDirectoryError:
            return ""


class _EntryBuilder:
    """Turns events and rows into entries, with a `Purge` before the first one of a new timeline.

    Args:
        begins: timeline -> step at which it began.
        timeline: the timeline of the last entry that was written.
    """

    def __init__(self, begins: dict[int, int], *, timeline: int) -> None:
        self.timeline = timeline
        self.entries: list[Entry] = []
        self._begins = begins

    def add_event(self, event: Event) -> None:
        if event.timeline_after in self._begins:
            self._switch_to(event.timeline_after)
        self.entries.append(event)

    def add_row(self, values: dict[str, float]) -> None:
        self._switch_to(int(values["timeline"]))
        self.entries.append(Row(values))

    def _switch_to(self, timeline: int) -> None:
        if timeline <= self.timeline:
            return
        begins = [step for other, step in self._begins.items() if self.timeline < other <= timeline]
        self.timeline = timeline
        if begins:
            self.entries.append(Purge(min(begins) + 1))


def _read_position(path: Path) -> Position:
    """Return the saved position. Where it is lost, the run is written again from its beginning."""
    try:
        return msgspec.json.decode(read_file(path), type=Position)
    except (OSError, msgspec.DecodeError):
        return Position()
