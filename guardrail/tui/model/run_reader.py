"""Reads a run directory and publishes snapshots of it.

Four threads share the work: one reads what is new, one sends commands and notes, one reads rows
again for a closer look, one works out previews. The screen's own thread reads no file, so keys
work also while a file system hangs.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence

from guardrail.core.errors import GuardrailError
from guardrail.core.events.run_state import Note
from guardrail.core.records.commands import Command
from guardrail.rundir.follow import Follower
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.background_facts import BackgroundReader
from guardrail.tui.model.curve_reader import CHUNK_ROWS, CurveReader
from guardrail.tui.model.failures import Failures, find_damage, format_reason, is_gone
from guardrail.tui.model.latest_snapshot import LatestSnapshot
from guardrail.tui.model.run_story import StoryBuilder
from guardrail.tui.model.view import Snapshot
from guardrail.tui.model.worker_thread import WorkerThread, WorkQueue
from guardrail.tui.numerics.decimated_series import EXACT

LOOK_SECONDS = 0.25  # between two reads of a run that is busy
WAIT_SECONDS = 1.0  # between two reads of a quiet one
PRESENCE_SECONDS = 5.0  # between two marks in the directory that a screen is attached
UNREADABLE = "cannot be read"  # as `Snapshot.damage`


class RunReader:
    """Reads a run directory when it changes, at most four times a second.

    Args:
        run: the directory.
        present: mark in the directory that a screen is attached, which could answer a question.
        clock: wall time.
        exact: how many of the newest rows are kept as they are, at least.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        present: bool = True,
        clock: Callable[[], float] = time.time,
        exact: int = EXACT,
    ) -> None:
        self._run, self._present, self._clock = run, present, clock
        self._latest = LatestSnapshot(Snapshot(run.name, loaded=False))
        self._failures = Failures()
        self._leaving = threading.Event()
        self._follower, self._story = Follower(run, most=CHUNK_ROWS), StoryBuilder()
        self._facts = BackgroundReader(run, clock=clock)
        self._curves = CurveReader(
            run,
            self._latest,
            clock=clock,
            exact=exact,
            leaving=self._leaving,
            timeline_end=self._timeline_end,
            on_failure=lambda error: self._fail("zoom", error),
        )
        self._start_over = False  # what was read may be incomplete: read it from the beginning
        self._journal_cut = False
        self._cut_rows = (0, 0)  # rows that metrics.bin had before it was cut, and has now
        self._heartbeat: float | None = None
        self._readable = True  # status.json, at the last read
        self._last_presence = -PRESENCE_SECONDS
        self._sending, self._zooming, self._previewing = WorkQueue(), WorkQueue(), WorkQueue()
        self._previewed: set[str] = set()  # ids of previews that are asked for and not answered
        self._sender = self._thread("sender", self._send_all)
        self._threads = [
            self._thread("reader", self._read),
            self._sender,
            self._thread("zoom", self._zooming.run),
            self._thread("preview", self._previewing.run),
        ]

    def _thread(self, name: str, work: Callable[[], None]) -> WorkerThread:
        return WorkerThread(name, work, leaving=self._leaving, on_failure=self._fail)

    def start(self, notify: Callable[[], None]) -> None:
        self._latest.notify = notify
        for thread in self._threads:
            thread.start()

    def latest(self) -> Snapshot:
        return self._latest.now

    def choose_signals(self, signals: tuple[str, ...], axis: str) -> None:
        self._curves.choose_signals(signals, axis)
        self._zooming.put(self._curves.read_signals)

    def request_rows(self, ranges: Sequence[tuple[float, float]]) -> None:
        """The same ranges, requested again and again, are read once.

        Rows of other ranges are dropped with the next read.
        """
        if self._curves.request_rows(ranges):
            self._zooming.put(self._curves.read_ranges)

    def send(self, command: Command) -> None:
        self._sending.put(lambda: self._send(command))

    def preview(self, command: Command) -> None:
        """A preview that is asked for again before it is ready is worked out once."""
        if command.id not in self._previewed:
            self._previewed.add(command.id)
            self._previewing.put(lambda: self._preview(command))

    def write_note(self, text: str) -> None:
        self._sending.put(lambda: self._write_note(text))

    def close(self) -> None:
        """Leave. All threads end with the process, so a file system that hangs stops nothing."""
        self._leaving.set()
        for waiting in (self._sending, self._zooming, self._previewing):
            waiting.close()
        self._sender.join(timeout=0.5)

    def _fail(self, name: str, error: Exception) -> None:
        self._failures.add(name, f"the {name} failed and starts again: {format_reason(error)}")
        self._latest.publish(problem=self._failures.recent())
        self._start_over = self._start_over or name == "reader"

    # -- reading what is new

    def _read(self) -> None:
        while not self._leaving.is_set():
            began = time.monotonic()
            self.look()
            self._show_presence()
            self._leaving.wait(max(0.0, LOOK_SECONDS - (time.monotonic() - began)))
            if not self._leaving.is_set():
                self._follower.wait(WAIT_SECONDS)
        self._follower.close()

    def look(self) -> None:
        """Read what is new and publish it; a read error comes in `Snapshot.problem`."""
        try:
            if not self._is_gone():
                self._look_at_all()
        except (OSError, GuardrailError) as error:
            problem = self._failures.recent(f"cannot read the run: {format_reason(error)}")
            self._latest.publish(loaded=True, problem=problem, damage=(UNREADABLE,))

    def _look_at_all(self) -> None:
        if self._start_over:
            self._read_again()
        self._look_at_status()
        self._look_at_file()
        while not self._follower.complete and not self._leaving.is_set():
            self._look_at_file()
        if self._curves.is_newly_summed_up():
            give_back()
        status = self._latest.now.status
        self._facts.look(ended=status is not None and status.phase.ended)
        damage = find_damage(
            self._run,
            status_known=status is not None,
            status_read=self._readable,
            journal_known=bool(self._latest.now.story.lines),
            unreadable=self._follower.unreadable,
            journal_cut=self._journal_cut,
            rows=self._cut_rows,
        )
        self._latest.publish(
            loaded=True,
            problem=self._failures.recent(),
            damage=damage,
            around=self._facts.around,
        )

    def _is_gone(self) -> bool:
        if not is_gone(self._run.path):
            self._latest.publish(gone=False)
            return False
        text = f"{self._run.path} was moved or deleted; shown is what was read before"
        self._latest.publish(gone=True, loaded=True, problem=self._failures.recent(text))
        return True

    def _read_again(self) -> None:
        """Read from the beginning: a file was cut, or what was read is incomplete."""
        if self._follower.cut == "metrics.bin":
            self._cut_rows = (max(self._cut_rows[0], self._follower.row), len(self._run.metrics()))
        self._journal_cut = self._journal_cut or self._follower.cut == "journal.jsonl"
        self._start_over = False
        self._follower.close()
        self._follower, self._story = Follower(self._run, most=CHUNK_ROWS), StoryBuilder()
        self._curves.start_over(story=self._story.story())

    def _look_at_status(self) -> None:
        status = self._run.read_status()
        self._readable = status is not None
        if status is None:
            return
        heard = self._latest.now.heard
        if status.heartbeat != self._heartbeat:
            # The first heartbeat may be old. Each later one came now, whatever the clock of the
            # other machine shows.
            now = self._clock()
            heard = min(status.heartbeat, now) if self._heartbeat is None else now
            self._heartbeat = status.heartbeat
        self._latest.publish(status=status, heard=heard)

    def _look_at_file(self) -> None:
        """Read new events, and the next rows."""
        update, view, rows = self._follower.poll(), self._follower.view, self._follower.fresh
        # Release the mapped file: its pages count as memory of this process.
        self._follower.view = self._follower.fresh = None
        if self._follower.cut:
            return self._read_again()
        if update.events:
            self._story.add(update.events)
            self._latest.publish(story=self._story.story())
            if self._latest.now.status is None:
                ended = self._run.status_of_end(update.events)
                if ended is not None:
                    self._latest.publish(status=ended, heard=ended.heartbeat)
        first, end = update.rows
        if view is not None and rows is not None and first < end:
            had = self._cut_rows[0]
            self._cut_rows = (0, 0) if end >= had else (had, end)
            self._curves.add(view.columns, rows, first)
        self._curves.apply_rollback()
        if first < end and self._follower.complete:
            self._facts.count_slowest(view)

    def _timeline_end(self, timeline: int) -> float:
        """Return the last step of a timeline; infinity while not all events are read."""
        if not self._follower.complete:
            return math.inf
        return self._follower.timelines.end(timeline)

    # -- sending

    def _send_all(self) -> None:
        self._sending.run()
        if self._present:
            self._run.screen_gone()

    def _show_presence(self) -> None:
        status = self._latest.now.status
        ended = status is not None and status.phase.ended
        waited = time.monotonic() - self._last_presence
        if self._present and not ended and waited >= PRESENCE_SECONDS:
            self._last_presence = time.monotonic()
            self._run.screen_seen()

    def _send(self, command: Command) -> None:
        try:
            self._run.send(command)
        # Every kind: the command is not sent, and its sender waits for an answer.
        except Exception as error:
            self._latest.publish(
                unsent={**self._latest.now.unsent, command.id: format_reason(error)}
            )

    def _write_note(self, text: str) -> None:
        status = self._latest.now.status
        step, timeline = (status.step, status.timeline) if status is not None else (0, 0)
        try:
            self._run.write_event(Note(message=text, step=step, timeline=timeline))
        except OSError as error:
            self._failures.add("note", f"the note is not in the journal: {format_reason(error)}")
            self._latest.publish(problem=self._failures.recent())

    def _preview(self, command: Command) -> None:
        from guardrail.operate import preview

        try:
            found = preview.preview_in_run(self._run, command, status=self._latest.now.status)
        except GuardrailError as error:
            found = preview.Preview(command=command.kind, worked_out=False, remark=str(error))
        finally:
            self._previewed.discard(command.id)
        self._latest.publish(previews={**self._latest.now.previews, command.id: found})


def give_back() -> None:
    """Return free memory to the system.

    glibc keeps it in pieces: 30 MB of them after a day, as measured by tests/bench/screen.py. Other
    C libraries have no such call.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
