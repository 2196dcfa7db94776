"""A thread that reports once a second: this rank lives, its phase and step, its main thread's
progress.

It reports to a folder on a local disk (`guardrail.rundir.rank_reports`). A second thread writes to
the run directory, which may be on a slow file system. So a disk that hangs does not make a rank
look dead. The training loop only assigns attributes. A full or missing disk costs a heartbeat,
never a step.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from guardrail.core.records.status import Phase, RankStatus, Status
from guardrail.rundir.rank_reports import NodeReports, count_nodes
from guardrail.rundir.run_directory import RunDirectory

LAST_TRIES = 25  # times 20 ms: so long this rank waits for the lock on the node's file


class Heartbeat:
    """Reports to the node's supervisor, or to the other ranks of the node.

    Rank 0 also writes status.json.

    Args:
        run: the run directory.
        rank: global rank of this process.
        status: called by the thread for status.json, on rank 0. Until it is set, the heartbeat
            keeps what the supervisor wrote, and adds the phase and the progress of a long set-up.
        incarnation: number of this start of the ranks; None: as supervisor and torch elastic count
            the starts.
        seconds: between two heartbeats.

    Attributes:
        step_seconds: time that this rank worked in the last step, set by the loop.
        meter: returns (percentage of time in which the GPU is busy, bytes in use on the GPU); None:
            not measured.
        failures: number of writes that failed.
        error: why the last one of them failed.
    """

    def __init__(
        self,
        run: RunDirectory,
        rank: int,
        *,
        status: Callable[[], Status] | None = None,
        incarnation: int | None = None,
        seconds: float = 1.0,
    ) -> None:
        self.status = status
        self.phase = Phase.SETUP
        self.step = 0
        self.progress = 0
        self.progress_time = time.time()
        self.step_seconds = 0.0
        self.meter: Callable[[], tuple[float, int]] | None = None
        self.failures = 0
        self.error = ""
        self._run, self._rank, self._seconds = run, rank, seconds
        self._incarnation = _incarnation() if incarnation is None else incarnation
        self._start = this_start()
        self._reports = NodeReports.of_rank(run, start=self._start)
        self._text = ""
        self._host = socket.gethostname()
        self._base: Status | None = None
        self._wake, self._changed, self._ended = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._writing = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> Heartbeat:
        if not self._threads:
            for work, name in (
                (self._beat, "guardrail-heartbeat"),
                (self._publish_status, "guardrail-status"),
            ):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        return self

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Record that the main thread is in `phase` and works on `step`. Counts as progress.

        A new phase is written at once.
        """
        if step is not None:
            self.step = step
        self.tick()
        if phase is not self.phase:
            self.phase = phase
            self._text = ""
            self._wake.set()

    def tick(self) -> None:
        """Record progress of the main thread."""
        self.progress += 1
        self.progress_time = time.time()

    def say(self, text: str) -> None:
        """Set the progress text of a long phase for status.json: "tokenizing 43 %".

        Counts as progress. The text is deleted when the phase changes.
        """
        self._text = text
        self.tick()

    def stop(self) -> None:
        """End the threads and write the last state. A second call is allowed. Never raises."""
        self._ended.set()
        self._wake.set()
        self._changed.set()
        for thread in self._threads:
            thread.join(timeout=10)
        self._try(self._write_rank)
        if self._writing.acquire(timeout=10):  # else the other thread hangs in a file operation
            try:
                self._publish_last()
                self._try(self._write_status)
            finally:
                self._writing.release()

    def _beat(self) -> None:
        while not self._ended.is_set():
            self._try(self._write_rank)
            self._changed.set()
            self._wake.wait(self._seconds)
            self._wake.clear()

    def _publish_status(self) -> None:
        while not self._ended.is_set():
            with self._writing:
                if self._reports.try_lock():
                    self._try(self._reports.publish)
                self._try(self._write_status)
            self._changed.wait(2 * self._seconds)  # until the other thread has reported
            self._changed.clear()

    def _publish_last(self) -> None:
        """Write the last report into the node's file.

        The ranks of a custom loop end together, and one of them writes. So this may wait.
        """
        for _ in range(LAST_TRIES if self._reports.shared else 1):
            if self._reports.try_lock():
                self._try(lambda: self._reports.publish(now=True))
                self._reports.close()
                return
            time.sleep(0.02)

    def _try(self, write: Callable[[], None]) -> None:
        """Call `write` and count its errors.

        These threads must live as long as their process. So every error is caught, and the write is
        repeated a second later. Examples: a full disk; a status that cannot be read during a
        rollback.
        """
        try:
            write()
        except Exception as error:
            self.failures += 1
            self.error = f"{type(error).__name__}: {error}"

    def _write_rank(self) -> None:
        busy, on_gpu = self.meter() if self.meter is not None else (-1.0, 0)
        report = RankStatus(
            rank=self._rank,
            pid=os.getpid(),
            host=self._host,
            phase=self.phase,
            step=self.step,
            progress=self.progress,
            progress_time=self.progress_time,
            heartbeat=time.time(),
            step_seconds=self.step_seconds,
            memory_bytes=resident_bytes(),
            gpu_percent=busy,
            gpu_memory_bytes=on_gpu,
            incarnation=self._incarnation,
            closed=self._ended.is_set(),
        )
        try:
            self._reports.write(report)
        except OSError:  # no local disk accepts it; in the run directory viewers still see it
            self._run.write_rank(report)

    def _write_status(self) -> None:
        if self._rank == 0:
            self._run.write_status(self._status())

    def _status(self) -> Status:
        """Return the status of the loop. What only the supervisor knows is kept from the file."""
        if self._base is None:
            self._base = self._run.read_status() or Status(run=self._run.name, phase=self.phase)
        base = self._base
        own = self.status() if self.status is not None else None
        known = own or base
        return msgspec.structs.replace(
            known,
            run=known.run or base.run or self._run.name,
            phase=own.phase if own is not None and own.phase.ended else self.phase,
            progress=self._text or (own.progress if own is not None else ""),
            heartbeat=time.time(),
            started=known.started or base.started,
            restarts=known.restarts or base.restarts,
            world=known.world or base.world,
            versions=known.versions or base.versions,
            supervisor_pid=known.supervisor_pid or base.supervisor_pid,
            start=self._start,
            host=self._host,
            pid=os.getpid(),
            exit_code=None,
        )


def _incarnation() -> int:
    """Return how many starts of the ranks came before this one.

    The sum of those by earlier elastic agents and those by this agent, which counts from 0.
    """
    counts = (
        os.environ.get(name, "") for name in ("GUARDRAIL_INCARNATION", "TORCHELASTIC_RESTART_COUNT")
    )
    return sum(int(count) for count in counts if count.isdigit())


def this_start() -> str:
    """Return the name of the start that this process belongs to. It is equal on all ranks.

    No clock is used. The rendezvous address changes with each rendezvous. Where it is fixed, the
    count of starts changes.

    On several nodes each elastic agent counts its starts, and a node that joins again counts from
    0. So the address alone is the name there. The exception: the address is that of the agents'
    store, which is the same for all starts. Then the count is part of the name too.
    """
    meeting = [
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    ]
    if count_nodes(os.environ) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
        return ":".join(meeting)
    return ":".join([*meeting, str(_incarnation())])


def resident_bytes() -> int:
    """Return the bytes of this process that are in RAM, without psutil.

    On Linux from its page count; on other systems the peak.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
