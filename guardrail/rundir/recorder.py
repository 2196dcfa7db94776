"""Rank 0 writes events and metric rows into the run directory. A failing disk never stops a step.

The journal and the status report such a disk. Events and rows wait in memory, in order, until they
can be written. They keep the time at which they happened.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.events.faults import DiskChanged
from guardrail.core.events.kinds import with_data
from guardrail.rundir.metrics import MetricsWriter
from guardrail.rundir.run_directory import RunDirectory

RETRY_SECONDS = 5.0  # between two attempts to write after a failure
ROWS_KEPT = 100_000  # rows that wait in memory, about 20 MB; above this limit the oldest are lost


class Recorder:
    """Writes journal and metrics of one trainer.

    Args:
        run: the run directory; None: nothing is written. The guard also works without one.
        active: True on rank 0. On other ranks the calls return the same events and write nothing.
        columns: signals to record in addition to the usual ones.
        learn: called with every event, written or not, so that all ranks have the same history.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        *,
        active: bool,
        learn: Callable[[Event], None],
        columns: Sequence[str] = (),
    ) -> None:
        self._run = run if active else None
        self._columns = tuple(columns)
        self._learn = learn
        self._metrics: MetricsWriter | None = None
        self._waiting: deque[Event] = deque()
        self._failing: dict[str, str] = {}
        self._rows: deque[dict[str, float]] = deque(maxlen=ROWS_KEPT)
        self._retry = 0.0
        self.written: dict[str, int] = {}  # kind -> seq of the newest line of that kind

    @property
    def disk(self) -> str:
        """Return "ok" or "failing: WHY", for status and screen."""
        return "ok" if not self._failing else "failing: " + "; ".join(self._failing.values())

    def write(self, event: Event) -> Event:
        """Append an event and sync it before returning. If the disk fails, queue it.

        Its time is the present one.
        """
        event = with_data(msgspec.structs.replace(event, time=time.time()))
        self._learn(event)
        if self._run is not None:
            self._waiting.append(event)
            self.flush()
        return event

    def settle(self) -> None:
        """Try once more to write all waiting events and rows, at the end of a run."""
        if self._run is not None and self._rows:
            self._write_rows(self._run)
        self.flush()

    @property
    def waiting_because(self) -> str:
        """Return why events wait that are not in the journal on disk; "": none wait."""
        return self._failing.get("journal", "they were not written yet") if self._waiting else ""

    def retry(self) -> None:
        """Try again to write waiting events, if it is time. For a loop that waits."""
        if self._waiting and time.monotonic() >= self._retry:
            self.flush()

    @property
    def has_waiting(self) -> bool:
        """Return whether events wait that are not in the journal on disk yet."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Write the waiting events.

        Called with each event, and every few seconds while events wait.
        """
        if self._run is None:
            return
        with self._note_result("journal"):
            while self._waiting:
                written = self._run.write_event(self._waiting[0])
                self.written[written.kind] = written.seq
                self._waiting.popleft()

    def row(self, values: dict[str, float]) -> None:
        """Append a metrics row. It is flushed to the kernel and not synced.

        It waits in memory while the disk fails.
        """
        if self._run is not None:
            self._rows.append(values)
            if time.monotonic() >= self._retry:
                self._write_rows(self._run)
                if self._waiting:
                    self.flush()

    def amend(self, values: dict[str, float]) -> None:
        """Replace the last row by `values`: the same row with more values."""
        if self._metrics is None or any(row is values for row in self._rows):
            return
        try:
            self._metrics.amend(values)
        except OSError as error:
            self.note_failing("metrics", f"metrics: {error.strerror or error}")

    def _write_rows(self, run: RunDirectory) -> None:
        with self._note_result("metrics"):
            if self._metrics is None:
                self._metrics = run.metrics_writer(self._columns)
            while self._rows:
                self._metrics.append(self._rows[0])
                self._rows.popleft()

    @contextlib.contextmanager
    def _note_result(self, what: str) -> Iterator[None]:
        """Note whether this block could write `what`. After a failure, wait before the next try."""
        try:
            yield
        except OSError as error:
            self._retry = time.monotonic() + RETRY_SECONDS
            self.note_failing(what, f"{what}: {error.strerror or error}")
        else:
            self.note_working(what)

    def note_failing(self, what: str, reason: str) -> None:
        """Record that `what` cannot be written. It is journaled when the reason changes."""
        if self._failing.get(what) == reason:
            return
        self._failing[what] = reason
        self._write_state("failing", f"disk failing: {reason}")

    def note_working(self, what: str) -> None:
        if self._failing.pop(what, None) is not None:
            self._write_state(
                "ok" if not self._failing else "failing", f"{what} can be written again"
            )

    def _write_state(self, state: str, message: str) -> None:
        if self._run is not None:
            event = with_data(
                DiskChanged(time=time.time(), message=message, state=state, reason=self.disk)
            )
            self._waiting.append(event)
            if "journal" not in self._failing:
                self.flush()

    def close(self) -> None:
        self.settle()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
