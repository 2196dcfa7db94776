"""From the run directory to snapshots. One thread reads what is new, one reads again what is looked
at closer, one hands commands in; the screen's own touches no disk, so that a file system that hangs
leaves the keys alive.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from guardrail.core.errors import GuardrailError
from guardrail.core.records import Command
from guardrail.rundir.follow import Follower
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.background_facts import BackgroundFacts
from guardrail.tui.model.failures import Failures, damage_of, is_gone, reason_of
from guardrail.tui.model.run_story import StoryBuilder
from guardrail.tui.model.view import Snapshot
from guardrail.tui.numerics.decimated_series import EXACT, Track
from guardrail.tui.numerics.series import SIGNALS, STEP, Detail, Series

LOOK_SECONDS = 0.25  # between two looks at a run that is busy
WAIT_SECONDS = 1.0  # between two looks at a quiet one
PRESENCE_SECONDS = 5.0
_CHUNK = 65536  # rows read, and mapped, before the screen hears of them
RETRY_SECONDS = 5.0  # between two tries to read what could not be read again
# before a thread that failed starts again; twice as long after each further failure
RESTART_SECONDS = 1.0


class Reader(Protocol):
    """What the screen needs of a run; tests bring their own."""

    def start(self, notify: Callable[[], None]) -> None:
        """Begin to read; `notify` is called, on any thread, whenever `latest` has something new."""

    def latest(self) -> Snapshot: ...

    def choose(self, signals: tuple[str, ...], axis: str) -> None:
        """Which curves are looked at, along which axis; never blocks, and comes with
        `Snapshot.series`.
        """

    def look_closer(self, stretches: Sequence[tuple[float, float]]) -> None:
        """These stretches of steps are looked at in single rows; never blocks, and comes with
        `Series.details`.
        """

    def send(self, command: Command) -> None:
        """Hand a command in; never blocks, and says a failure through `Snapshot.unsent`."""

    def preview(self, command: Command) -> None:
        """Work out what a command would do; never blocks, and says it through
        `Snapshot.previews`.
        """

    def note(self, text: str) -> None:
        """Write a note into the journal; never blocks, and says a failure through
        `Snapshot.trouble`.
        """

    def close(self) -> None: ...


class RunReader:
    """Reads a run directory when it changes, at most four times a second.

    Args:
        run: the directory.
        present: say in the directory that somebody watches, who could answer a question.
        clock: wall time.
        exact: newest rows that are kept as they are, at least.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        present: bool = True,
        clock: Callable[[], float] = time.time,
        exact: int = EXACT,
    ) -> None:
        self._run, self._present, self._clock, self._exact = run, present, clock, exact
        self._follower = Follower(run, most=_CHUNK)
        self._track, self._story = self._new_track(), StoryBuilder()
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._shelf: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._foreseeing: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._foreseen: set[str] = set()  # ids of previews that are asked for and not answered
        self._lookout = BackgroundFacts(run, clock=clock)
        self._leaving = threading.Event()
        self._failures = Failures()
        self._again = False  # what was read may be half taken in: read it from the beginning
        self._journal_cut = False
        self._cut_rows = (0, 0)  # rows that metrics.bin had before it was cut, and has now
        self._heartbeat: float | None = None
        self._readable = True  # status.json, at the last look
        self._seen = -PRESENCE_SECONDS
        self._latest = Snapshot(run.name, loaded=False)
        self._lock = threading.Lock()  # both threads replace parts of `_latest`
        self._wanted: tuple[tuple[str, ...], str] = ((), STEP)
        self._kept: tuple[tuple[str, ...], str] = ((), STEP)  # what `_track` keeps
        self._taken = 0  # rows that are in `_track`
        self._tracking = threading.Lock()  # of these, of `_track` and of `_details`
        self._details: tuple[Detail, ...] = ()
        self._cuts = 0  # of `_track`, when these were read
        self._sums = 0  # of `_track`, when memory was given back
        # what is wanted, and what was tried last, and when
        self._closer: tuple[tuple[float, float], ...] = ()
        self._tried: tuple[tuple[tuple[float, float], ...], float] = ((), 0.0)
        self._notify: Callable[[], None] = lambda: None
        works = (
            ("reader", self._read),
            ("sender", self._work),
            ("zoom", self._look_up),
            ("preview", self._foresee),
        )
        self._threads = [
            threading.Thread(
                target=self._keep_going, args=work, name=f"guardrail-{work[0]}", daemon=True
            )
            for work in works
        ]

    def start(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        for thread in self._threads:
            thread.start()

    def latest(self) -> Snapshot:
        return self._latest

    def choose(self, signals: tuple[str, ...], axis: str) -> None:
        self._wanted = (signals, axis)
        self._shelf.put(self._track_anew)

    def look_closer(self, stretches: Sequence[tuple[float, float]]) -> None:
        """Asked again and again, it reads once; what nobody asks for any more is let go of with the
        next reading.
        """
        wanted = tuple(stretches)
        tried, when = self._tried
        if wanted and (wanted != tried or time.monotonic() - when >= RETRY_SECONDS):
            self._tried = (wanted, time.monotonic())
            self._closer = wanted
            self._shelf.put(self._read_closer)

    def send(self, command: Command) -> None:
        self._outbox.put(lambda: self._hand_in(command))

    def preview(self, command: Command) -> None:
        """Asked for again before it is answered, it is worked out once."""
        if command.id not in self._foreseen:
            self._foreseen.add(command.id)
            self._foreseeing.put(lambda: self._work_out(command))

    def note(self, text: str) -> None:
        self._outbox.put(lambda: self._write_down(text))

    def close(self) -> None:
        """Leave. A file system that hangs does not hold the screen: all threads end with the
        process.
        """
        self._leaving.set()
        self._outbox.put(None)
        self._shelf.put(None)
        self._foreseeing.put(None)
        if self._threads[1].is_alive():
            self._threads[1].join(timeout=0.5)

    def _keep_going(self, name: str, work: Callable[[], None]) -> None:
        """The work of one thread until the screen is left. Where it fails, the screen says so, and
        it starts again.
        """
        pause = RESTART_SECONDS
        while not self._leaving.is_set():
            try:
                return work()
            # whatever it is: a thread that dies without a word looks like a quiet run
            except Exception as error:
                self._fail(name, error)
                self._again = self._again or name == "reader"
                self._leaving.wait(pause)
                pause = min(2 * pause, 30.0)

    def _fail(self, name: str, error: Exception) -> None:
        self._failures.add(name, f"the {name} failed and starts again: {reason_of(error)}")
        self._publish(trouble=self._failures.said())

    def look(self) -> None:
        """Read what is new and publish it; what cannot be read is said in `Snapshot.trouble`."""
        try:
            if self._is_gone():
                return
            if self._again:
                self._read_again()
            self._look_at_status()
            self._look_at_file()
            while not self._follower.complete and not self._leaving.is_set():
                self._look_at_file()
            if self._track.sums != self._sums:
                self._sums = self._track.sums
                give_back()
            status = self._latest.status
            self._lookout.look(ended=status is not None and status.phase.ended)
            damage = damage_of(
                self._run,
                status_known=status is not None,
                status_read=self._readable,
                journal_known=bool(self._latest.story.lines),
                unreadable=self._follower.unreadable,
                journal_cut=self._journal_cut,
                rows=self._cut_rows,
            )
            self._publish(
                loaded=True,
                trouble=self._failures.said(),
                damage=damage,
                around=self._lookout.around,
            )
        except (OSError, GuardrailError) as error:
            trouble = self._failures.said(f"cannot read the run: {reason_of(error)}")
            self._publish(loaded=True, trouble=trouble, damage=("cannot be read",))

    def _is_gone(self) -> bool:
        gone = is_gone(self._run.path)
        text = f"{self._run.path} was moved or deleted; shown is what was read before"
        self._publish(
            gone=gone, **({"loaded": True, "trouble": self._failures.said(text)} if gone else {})
        )
        return gone

    def _read_again(self) -> None:
        """From the beginning: a file has lost what was read of it, or what was read is half taken
        in.
        """
        if self._follower.cut == "metrics.bin":
            self._cut_rows = (max(self._cut_rows[0], self._follower.row), len(self._run.metrics()))
        self._journal_cut = self._journal_cut or self._follower.cut == "journal.jsonl"
        self._again = False
        self._follower.close()
        self._follower, self._story = Follower(self._run, most=_CHUNK), StoryBuilder()
        with self._tracking:
            self._track, self._taken, self._cuts = self._new_track(*self._kept), 0, -1
            self._publish(series=self._series(), story=self._story.story())

    def _read(self) -> None:
        while not self._leaving.is_set():
            began = time.monotonic()
            self.look()
            self._show_presence()
            self._leaving.wait(max(0.0, LOOK_SECONDS - (time.monotonic() - began)))
            if not self._leaving.is_set():
                self._follower.wait(WAIT_SECONDS)
        self._follower.close()

    def _look_at_status(self) -> None:
        status = self._run.read_status()
        self._readable = status is not None
        if status is None:
            return
        heard = self._latest.heard
        if status.heartbeat != self._heartbeat:
            # What was there when we came may be old; whatever comes later came now, whatever the
            # other clock says.
            now = self._clock()
            heard = min(status.heartbeat, now) if self._heartbeat is None else now
            self._heartbeat = status.heartbeat
        self._publish(status=status, heard=heard)

    def _look_at_file(self) -> None:
        """Events, and the next rows."""
        update, view, rows = self._follower.poll(), self._follower.view, self._follower.fresh
        # Let go of the mapped file: pages that were looked at count as this process's memory.
        self._follower.view = self._follower.fresh = None
        if self._follower.cut:
            return self._read_again()
        if update.events:
            self._story.add(update.events)
            self._publish(story=self._story.story())
            if (
                self._latest.status is None
                and (ended := self._run.status_of_end(update.events)) is not None
            ):
                self._publish(status=ended, heard=ended.heartbeat)
        first, end = update.rows
        with self._tracking:
            if view is not None and rows is not None and first < end:
                self._track.add(view.columns, rows, first=first)
                self._taken = end
                self._cut_rows = (0, 0) if end >= self._cut_rows[0] else (self._cut_rows[0], end)
                self._publish(series=self._series(), columns=tuple(view.columns))
            self._leave(self._track)
            if self._track.last_step < self._latest.series.last_step:
                self._publish(series=self._series())
        if first < end and self._follower.complete:
            self._lookout.look_at_rows(view)

    def _leave(self, track: Track) -> None:
        """A rollback is true from its journal line on, before the first row of the new timeline."""
        limit = (
            self._follower.timelines.end(track.timeline) if self._follower.complete else math.inf
        )
        if limit < track.last_step:
            track.abandon(after=limit)

    def _new_track(self, signals: tuple[str, ...] = (), axis: str = STEP) -> Track:
        return Track(signals, (axis,), exact=self._exact, again=self._rows_again)

    def _series(self) -> Series:
        """With those details that are still true."""
        if self._track.cuts != self._cuts:
            self._cuts, self._details, self._tried = self._track.cuts, (), ((), 0.0)
        return replace(self._track.series(), details=self._details)

    def _track_anew(self) -> None:
        """Read the rows again for signals that were not kept so far; what is kept beyond need
        stays.
        """
        signals, axis = self._wanted
        with self._tracking:
            if set(signals) <= {*SIGNALS, *self._kept[0]} and axis in (STEP, self._kept[1]):
                return
            track = self._new_track(signals, axis)
            try:
                for first, columns, rows in self._in_chunks(0, self._taken):
                    track.add(columns, rows, first=first)
            except (OSError, GuardrailError) as error:
                return self._fail("zoom", error)
            self._leave(track)
            # details do not have the signals
            self._track, self._kept, self._cuts = track, (signals, axis), -1
            self._publish(series=self._series())

    def _in_chunks(self, first: int, end: int) -> Iterable[tuple[int, Sequence[str], np.ndarray]]:
        """(number of the first, columns, rows) of rows [first, end) of the file."""
        for at in range(first, end, _CHUNK):
            columns, rows = self._run.rows(at, min(end, at + _CHUNK))
            yield at, columns, rows

    def _rows_again(self, first: int, end: int) -> tuple[Sequence[str], np.ndarray]:
        """For `Track`, which needs a few of them; none where they cannot be read just now."""
        try:
            return self._run.rows(first, end)
        except (OSError, GuardrailError):
            return (), np.zeros((0, 0))

    def _read_closer(self) -> None:
        """Read the rows of the stretches that are looked at; those that are at hand already are not
        read again.
        """
        wanted, kept = self._closer, self._kept
        with self._tracking:
            series, details = self._series(), {(one.low, one.high): one for one in self._details}
            cuts = self._cuts
        missing = [stretch for stretch in wanted if stretch not in details]
        if not missing:
            return
        self._publish(looking_up=self._clock())
        try:
            for stretch in missing:
                if (found := self._detail(series, kept, *stretch)) is not None:
                    details[stretch] = found
                if self._closer != wanted or self._leaving.is_set():
                    return  # somebody looks elsewhere by now
        except (OSError, GuardrailError) as error:
            return self._fail("zoom", error)
        finally:
            self._publish(looking_up=None)
        with self._tracking:
            if (self._track.cuts, self._kept) != (cuts, kept):
                # they may be abandoned, or lack what is looked at: to be asked for anew
                self._tried = ((), 0.0)
                return
            self._details = tuple(details[stretch] for stretch in wanted if stretch in details)
            self._publish(series=self._series())

    def _detail(
        self, series: Series, kept: tuple[tuple[str, ...], str], low: float, high: float
    ) -> Detail | None:
        """All rows of the present with steps in [low, high], and the rest of the points that they
        are in.
        """
        if not len(series):
            return None
        point = int(np.searchsorted(series.step, low))
        last = min(len(series) - 1, int(np.searchsorted(series.step, high, side="right")))
        first, end = int(series.row[point - 1]) + 1 if point else 0, int(series.row[last]) + 1
        base = (
            {name: float(places[point - 1]) for name, places in series.axes.items()}
            if point
            else {}
        )
        track = Track(kept[0], (kept[1],), exact=EXACT, base=base)
        for at, columns, rows in self._in_chunks(first, end):
            track.add(columns, rows, first=at)
            if self._leaving.is_set():
                return None
        found = replace(track.series(), ghosts=())
        return Detail(found, first, end, low, high) if len(found) else None

    def _publish(self, **news: Any) -> None:
        """Replace the latest snapshot, and say so where it says something new."""
        with self._lock:
            if all(getattr(self._latest, name) == value for name, value in news.items()):
                return
            self._latest = replace(self._latest, **news)
        self._notify()

    def _show_presence(self) -> None:
        status = self._latest.status
        ended = status is not None and status.phase.ended
        if self._present and not ended and time.monotonic() - self._seen >= PRESENCE_SECONDS:
            self._seen = time.monotonic()
            self._run.screen_seen()

    def _work(self) -> None:
        while (work := self._outbox.get()) is not None:
            work()
        if self._present:
            self._run.screen_gone()

    def _look_up(self) -> None:
        while (work := self._shelf.get()) is not None:
            work()

    def _foresee(self) -> None:
        while (work := self._foreseeing.get()) is not None:
            work()

    def _hand_in(self, command: Command) -> None:
        try:
            self._run.send(command)
        # whatever it was: the command has not been sent, and whoever gave it waits
        except Exception as error:
            self._publish(unsent={**self._latest.unsent, command.id: reason_of(error)})

    def _work_out(self, command: Command) -> None:
        from guardrail.operate import preview

        try:
            told = preview.foresee(self._run, command, status=self._latest.status)
        except GuardrailError as error:
            told = preview.Preview(command=command.kind.value, worked_out=False, remark=str(error))
        finally:
            self._foreseen.discard(command.id)
        self._publish(previews={**self._latest.previews, command.id: told})

    def _write_down(self, text: str) -> None:
        status = self._latest.status
        step, timeline = (status.step, status.timeline) if status is not None else (0, 0)
        try:
            self._run.append("note", text, step=step, timeline=timeline)
        except OSError as error:
            self._failures.add("note", f"the note is not in the journal: {reason_of(error)}")
            self._publish(trouble=self._failures.said())


def give_back() -> None:
    """Hand what is free back to the system. The C library keeps it in pieces, 30 MB of them after a
    day, as measured by tests/bench/screen.py; where it is not glibc there is nothing to call."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
