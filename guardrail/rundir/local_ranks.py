"""The rank processes of one node: descendants of the supervisor, and their last reports."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import psutil

from guardrail.core.records.status import RankStatus
from guardrail.rundir import processes
from guardrail.rundir.rank_reports import FOLDER_VARIABLE, NODE_VARIABLE, NodeReports
from guardrail.rundir.run_directory import RunDirectory


def become_reaper() -> None:
    """Make this process the parent of descendants whose parent dies.

    It calls prctl PR_SET_CHILD_SUBREAPER (Linux 3.4). So ranks that outlive their elastic agent are
    still found among the descendants, also when they have another session.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


class LocalRanks:
    """The ranks of one node: children of the elastic agent.

    Args:
        run: the run directory.
        node_rank: number of this node.
        nodes: number of nodes.

    Attributes:
        reports: pid -> last report of that process; None: it has not reported yet. Live ranks
            only; empty between two starts of the ranks.
        last_pids: pids of the newest start, also after it has ended.
        heard: one of them has reported. From then on rank 0 writes the status, including the last
            one.
    """

    def __init__(self, run: RunDirectory, *, node_rank: int = 0, nodes: int = 1) -> None:
        self._run, self._node_rank, self._nodes = run, node_rank, nodes
        self._starts = 0
        self._reports: NodeReports | None = None
        self._last_reports: dict[int, RankStatus] = {}  # pid -> last report, of ranks of this agent
        self._myself = psutil.Process()
        self._processes: dict[int, psutil.Process] = {}
        self._numbers: dict[int, int] = {}
        self._orphans: list[psutil.Process] = []
        self._spared: set[int] = set()
        # so that a child that is being started is not taken for a rank
        self._sparing = threading.Lock()
        self.reports: dict[int, RankStatus | None] = {}
        self.last_pids: set[int] = set()
        self.heard = False

    def begin(self) -> dict[str, str]:
        """Prepare for the ranks of the next elastic agent; return their environment variables.

        The ranks of an earlier agent are forgotten. The next ones report to a new folder, so it
        holds no report of an earlier start.
        """
        self.end()
        self._starts += 1
        self._reports = NodeReports.of_supervisor(
            self._run, node_rank=self._node_rank, nodes=self._nodes, start=self._starts
        )
        return {FOLDER_VARIABLE: str(self._reports.folder), NODE_VARIABLE: str(self._node_rank)}

    def end(self) -> None:
        """Publish the last reports, close their folder, and forget the ranks of the last agent."""
        if self._reports is not None:
            self.publish(now=True)
            self._reports.close()
        self._reports = None
        self._processes, self._orphans, self.reports, self._last_reports, self._numbers = (
            {},
            [],
            {},
            {},
            {},
        )
        self.last_pids, self.heard = set(), False

    def publish(self, *, now: bool = False) -> None:
        """Write the reports of this node's ranks to the run directory, if it is time."""
        reports = self._reports
        if reports is not None:
            with contextlib.suppress(OSError):  # the next call writes them
                reports.publish(now=now)

    def look(self, agent_pid: int) -> None:
        """Find the live ranks and read their reports.

        A report of an earlier start has another pid.
        """
        found, self._orphans = {}, []
        for process in self._children():
            with contextlib.suppress(psutil.Error):
                parent = process.ppid()
                if parent == agent_pid and processes.alive(process):
                    found[process.pid] = process
                elif parent == self._myself.pid and process.pid != agent_pid:
                    self._orphans.append(process)
        self.read()
        self._processes = found
        self.reports = {pid: self._last_reports.get(pid) for pid in found}
        if found:
            same = not self.last_pids.isdisjoint(found)
            self.last_pids = self.last_pids | found.keys() if same else set(found)
            self.heard = bool(self.registered) or (self.heard and same)

    def read(self) -> None:
        """Read the reports of the ranks."""
        if self._reports is not None:
            self._last_reports.update({report.pid: report for report in self._reports.read()})
        self._numbers.update({pid: report.rank for pid, report in self._last_reports.items()})

    def last_report(self, pid: int) -> RankStatus | None:
        """Return the last report of a rank of this agent, also of a dead one."""
        return self._last_reports.get(pid)

    @contextlib.contextmanager
    def spared(self, *arguments: Any, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start a child of the supervisor that is not a rank.

        `sweep` and `bury` neither end nor reap it. The arguments are those of `subprocess.Popen`.
        """
        with self._sparing:
            process = subprocess.Popen(*arguments, **options)
            self._spared.add(process.pid)
        try:
            with process:
                yield process
        finally:
            self._spared.discard(process.pid)

    def _children(self) -> list[psutil.Process]:
        """Return all descendants, except the spared children and their descendants."""
        with self._sparing:
            found = self._myself.children(recursive=True)
            spared = set(self._spared)
        if not spared:
            return found
        kept = []
        for process in found:
            with contextlib.suppress(psutil.Error):
                if spared.isdisjoint({process.pid, *(parent.pid for parent in process.parents())}):
                    kept.append(process)
        return kept

    @property
    def registered(self) -> Mapping[int, RankStatus]:
        return {pid: report for pid, report in self.reports.items() if report is not None}

    def activity(self) -> tuple[dict[int, float], set[int]]:
        """Return (pid -> CPU seconds of each live rank, pids of ranks that a signal has stopped).

        A process that a debugger has stopped counts as working, not as stopped.
        """
        cpu, stopped = {}, set()
        for pid, process in self._processes.items():
            with contextlib.suppress(psutil.Error), process.oneshot():
                used, status = process.cpu_times(), process.status()
                traced = status == psutil.STATUS_TRACING_STOP
                cpu[pid] = time.monotonic() if traced else used.user + used.system
                if status == psutil.STATUS_STOPPED:
                    stopped.add(pid)
        return cpu, stopped

    def number(self, pid: int) -> int | None:
        """Return the global rank of a process of this node; None: unknown.

        Before its first report, the rank is read from its environment.
        """
        if pid not in self._numbers and pid in self._processes:
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                self._numbers[pid] = int(self._processes[pid].environ()["RANK"])
        return self._numbers.get(pid)

    def send_signal(self, pid: int, number: signal.Signals) -> None:
        if pid in self._processes:
            processes.send_signal(self._processes[pid], number)

    def kill(self, pids: Collection[int] | None = None) -> None:
        """Send SIGKILL to the ranks, or to those of `pids`, and to their descendants.

        The agent then finds that they have failed.
        """
        ranks = [rank for pid, rank in self._processes.items() if pids is None or pid in pids]
        victims = list(ranks)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                victims += rank.children(recursive=True)
        processes.kill(victims)

    def sweep(self, *, kill: bool) -> None:
        """Reap the dead orphans. With `kill`, end the live ones: workers of a dead rank."""
        for orphan in self._orphans:
            if not processes.alive(orphan):
                processes.reap(orphan)
            elif kill:
                processes.kill([orphan])

    def bury(self) -> list[psutil.Process]:
        """End and reap every descendant; return those that the kernel cannot end."""
        self._processes, self.reports = {}, {}
        while left := self._children():
            if stuck := processes.kill(left):
                return stuck
        return []
