"""The curves of a run: all of its rows, older ones summed up, and single rows of requested ranges.

The reader's thread adds new rows. The zoom thread reads rows again: for signals that were not kept
so far, and for ranges of steps that the viewer zooms into.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from guardrail.core.errors import GuardrailError
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.latest_snapshot import LatestSnapshot
from guardrail.tui.numerics.decimated_series import EXACT, DecimatedSeries
from guardrail.tui.numerics.series import SIGNALS, STEP, Detail, Series

CHUNK_ROWS = 65536  # read, and mapped, before the screen draws them
RETRY_SECONDS = 5.0  # between two tries to read rows that could not be read

Signals = tuple[tuple[str, ...], str]  # names of signals, and the axis
Ranges = tuple[tuple[float, float], ...]  # ranges [low, high] of steps


class CurveReader:
    """Keeps the curves and publishes them as `Snapshot.series`.

    Args:
        run: the directory.
        latest: where curves are published.
        clock: wall time.
        exact: how many of the newest rows are kept as they are, at least.
        leaving: set when the screen is left; long reads end then.
        timeline_end: timeline -> its last step as far as the journal is known, infinity where it
            goes on.
        on_failure: called with the exception where rows cannot be read again.
    """

    def __init__(
        self,
        run: RunDirectory,
        latest: LatestSnapshot,
        *,
        clock: Callable[[], float],
        exact: int,
        leaving: threading.Event,
        timeline_end: Callable[[int], float],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._run, self._latest, self._clock, self._exact = run, latest, clock, exact
        self._leaving, self._timeline_end, self._on_failure = leaving, timeline_end, on_failure
        self._wanted: Signals = ((), STEP)
        self._requested: Ranges = ()
        self._tried: tuple[Ranges, float] = ((), 0.0)  # ranges that were read last, and when
        # The lock is for the fields below: both threads change them.
        self._lock = threading.Lock()
        self._track = self._new_track()
        self._kept: Signals = ((), STEP)  # what `_track` keeps
        self._taken = 0  # rows of the file that are in `_track`
        self._details: tuple[Detail, ...] = ()
        self._cuts = 0  # `_track.cuts` when the details were read
        self._sums = 0  # `_track.sums` at the last `is_newly_summed_up`

    # -- on the reader's thread

    def start_over(self, **news: object) -> None:
        """Drop all rows, and publish that with other `news`."""
        with self._lock:
            self._track, self._taken, self._cuts = self._new_track(*self._kept), 0, -1
            self._latest.publish(series=self._series(), **news)

    def add(self, columns: Sequence[str], rows: np.ndarray, first: int) -> None:
        """Add rows [first, first + len(rows)) of the file, and publish the curves."""
        with self._lock:
            self._track.add(columns, rows, first=first)
            self._taken = first + len(rows)
            self._latest.publish(series=self._series(), columns=tuple(columns))

    def apply_rollback(self) -> None:
        """Abandon the rows after the end of their timeline.

        A rollback counts from its journal line on, before the first row of the new timeline.
        """
        with self._lock:
            self._abandon_ended(self._track)
            if self._track.last_step < self._latest.now.series.last_step:
                self._latest.publish(series=self._series())

    def is_newly_summed_up(self) -> bool:
        """Whether rows were summed up since the last call: then memory has become free."""
        before, self._sums = self._sums, self._track.sums
        return self._sums != before

    # -- requests of the screen

    def choose_signals(self, signals: tuple[str, ...], axis: str) -> None:
        """Set what `read_signals` reads."""
        self._wanted = (signals, axis)

    def request_rows(self, ranges: Sequence[tuple[float, float]]) -> bool:
        """Set what `read_ranges` reads; False where the same was tried less than 5 s ago."""
        wanted = tuple(ranges)
        tried, when = self._tried
        if not wanted or (wanted == tried and time.monotonic() - when < RETRY_SECONDS):
            return False
        self._tried = (wanted, time.monotonic())
        self._requested = wanted
        return True

    # -- on the zoom thread

    def read_signals(self) -> None:
        """Read all rows again for signals that were not kept so far; those kept before stay."""
        signals, axis = self._wanted
        with self._lock:
            if set(signals) <= {*SIGNALS, *self._kept[0]} and axis in (STEP, self._kept[1]):
                return
            track = self._new_track(signals, axis)
            try:
                for first, columns, rows in self._in_chunks(0, self._taken):
                    track.add(columns, rows, first=first)
            except (OSError, GuardrailError) as error:
                return self._on_failure(error)
            self._abandon_ended(track)
            # details do not have the signals
            self._track, self._kept, self._cuts = track, (signals, axis), -1
            self._latest.publish(series=self._series())

    def read_ranges(self) -> None:
        """Read the rows of the requested ranges that are not in memory; drop those of others."""
        wanted, kept = self._requested, self._kept
        with self._lock:
            series, details = self._series(), {(one.low, one.high): one for one in self._details}
            cuts = self._cuts
        missing = [ends for ends in wanted if ends not in details]
        if not missing:
            return
        self._latest.publish(looking_up=self._clock())
        try:
            for ends in missing:
                if (found := self._detail(series, kept, *ends)) is not None:
                    details[ends] = found
                if self._requested != wanted or self._leaving.is_set():
                    return  # the viewer has moved on
        except (OSError, GuardrailError) as error:
            return self._on_failure(error)
        finally:
            self._latest.publish(looking_up=None)
        with self._lock:
            if (self._track.cuts, self._kept) != (cuts, kept):
                # These rows may be abandoned, or lack a signal: the next request reads them anew.
                self._tried = ((), 0.0)
                return
            self._details = tuple(details[ends] for ends in wanted if ends in details)
            self._latest.publish(series=self._series())

    def _detail(self, series: Series, kept: Signals, low: float, high: float) -> Detail | None:
        """Return the rows of the present timeline with steps in [low, high].

        Their first and last point may stand for several rows: the rest of these rows is read too.
        """
        if not len(series):
            return None
        point = int(np.searchsorted(series.step, low))
        last = min(len(series) - 1, int(np.searchsorted(series.step, high, side="right")))
        first, end = 0, int(series.row[last]) + 1
        base: dict[str, float] = {}
        if point:
            first = int(series.row[point - 1]) + 1
            base = {name: float(places[point - 1]) for name, places in series.axes.items()}
        track = DecimatedSeries(kept[0], (kept[1],), exact=EXACT, base=base)
        for at, columns, rows in self._in_chunks(first, end):
            track.add(columns, rows, first=at)
            if self._leaving.is_set():
                return None
        found = replace(track.series(), abandoned=())
        return Detail(found, first, end, low, high) if len(found) else None

    # -- the track

    def _new_track(self, signals: tuple[str, ...] = (), axis: str = STEP) -> DecimatedSeries:
        return DecimatedSeries(signals, (axis,), exact=self._exact, again=self._rows_again)

    def _abandon_ended(self, track: DecimatedSeries) -> None:
        limit = self._timeline_end(track.timeline)
        if limit < track.last_step:
            track.abandon(after=limit)

    def _series(self) -> Series:
        """Return the curves with those details that are still true."""
        if self._track.cuts != self._cuts:
            self._cuts, self._details, self._tried = self._track.cuts, (), ((), 0.0)
        return replace(self._track.series(), details=self._details)

    def _in_chunks(self, first: int, end: int) -> Iterable[tuple[int, Sequence[str], np.ndarray]]:
        """Yield rows [first, end) of the file as (number of the first, columns, rows)."""
        for at in range(first, end, CHUNK_ROWS):
            columns, rows = self._run.rows(at, min(end, at + CHUNK_ROWS))
            yield at, columns, rows

    def _rows_again(self, first: int, end: int) -> tuple[Sequence[str], np.ndarray]:
        """Return rows [first, end) for the track; none where they cannot be read just now."""
        try:
            return self._run.rows(first, end)
        except (OSError, GuardrailError):
            return (), np.zeros((0, 0))
