"""A thread that reports once a second that this rank lives, where it is, and whether its main
thread gets ahead.

It reports to a folder on a local disk (`guardrail.rundir.rank_reports`). A second thread writes
what goes to the run directory, which may lie on a slow file system: a disk that hangs must not make
a rank look dead. The training loop only assigns attributes. A disk that is full or gone costs a
heartbeat, never a step.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from guardrail.core.records import Phase, RankStatus, Status
from guardrail.rundir.rank_reports import NodeReports, count_nodes
from guardrail.rundir.run_directory import RunDirectory

LAST_TRIES = 25  # times 20 ms, for another rank of the node to leave the node's file to this one


class Heartbeat:
    """Reports to the node's supervisor, or to the other ranks of the node; rank 0 writes
    status.json as well.

    Args:
        run: the run directory.
        rank: of this process in the whole run.
        status: called by the thread for status.json, on rank 0. Until it is set, the heartbeat
            tells what it knows itself, on top of what the supervisor wrote: phase and progress of a
            long set-up.
        incarnation: which start of the ranks this is; None: as supervisor and torch elastic count
        them.
        seconds: between two beats.

    Attributes:
        step_seconds: what this rank worked in the last step, set by the loop.
        meter: tells (per cent in which the GPU is busy, bytes in use on it), where there is one.
        failures, error: beats that could not be written, and why the last one could not.
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
                (self._tell, "guardrail-status"),
            ):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        return self

    def at(self, phase: Phase, step: int | None = None) -> None:
        """The main thread is in `phase`, working on `step`; counts as progress. A new phase is
        written at once.
        """
        if step is not None:
            self.step = step
        self.tick()
        if phase is not self.phase:
            self.phase = phase
            self._text = ""
            self._wake.set()

    def tick(self) -> None:
        """The main thread got ahead."""
        self.progress += 1
        self.progress_time = time.time()

    def say(self, text: str) -> None:
        """How far a long phase is, for status.json: "tokenizing 43 %". Counts as progress; gone
        with the phase.
        """
        self._text = text
        self.tick()

    def stop(self) -> None:
        """End the threads and write the last state. May be called again; never raises."""
        self._ended.set()
        self._wake.set()
        self._changed.set()
        for thread in self._threads:
            thread.join(timeout=10)
        self._try(self._write_rank)
        if self._writing.acquire(timeout=10):  # else the other thread hangs in a file system
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

    def _tell(self) -> None:
        while not self._ended.is_set():
            with self._writing:
                if self._reports.try_lock():
                    self._try(self._reports.publish)
                self._try(self._write_status)
            self._changed.wait(2 * self._seconds)  # for what the other thread has reported
            self._changed.clear()

    def _publish_last(self) -> None:
        """Have the last report in the node's file: the ranks of a custom loop end together, and one
        of them writes.
        """
        for _ in range(LAST_TRIES if self._reports.shared else 1):
            if self._reports.try_lock():
                self._try(lambda: self._reports.publish(now=True))
                self._reports.close()
                return
            time.sleep(0.02)

    def _try(self, write: Callable[[], None]) -> None:
        """Whatever goes wrong here, from a full disk to a status that cannot be read in the middle
        of a rollback, is counted and tried again a second later: these threads must not die before
        their process.
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
        except OSError:  # no local disk takes it: at least a viewer sees it
            self._run.write_rank(report)

    def _write_status(self) -> None:
        if self._rank == 0:
            self._run.write_status(self._status())

    def _status(self) -> Status:
        """The loop's own status; what only the supervisor knows is kept from the file."""
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
    """Starts of the ranks before this one: by earlier elastic agents, and by this one, which counts
    from 0.
    """
    counts = (
        os.environ.get(name, "") for name in ("GUARDRAIL_INCARNATION", "TORCHELASTIC_RESTART_COUNT")
    )
    return sum(int(count) for count in counts if count.isdigit())


def this_start() -> str:
    """Names the start that this process belongs to: equal on all ranks, and no clock is asked.

    Where the ranks meet changes with each rendezvous; where it is fixed, the count of starts does.
    On several nodes each elastic agent has a count of its own, and that of a node which has come
    back begins anew: there the meeting alone names the start, unless it is that of the agents' own
    store and so the same for all starts.
    """
    meeting = [
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    ]
    if count_nodes(os.environ) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
        return ":".join(meeting)
    return ":".join([*meeting, str(_incarnation())])


def resident_bytes() -> int:
    """Memory of this process that is in RAM, without psutil: the page count of Linux, else the
    peak.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
