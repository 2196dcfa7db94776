"""The processes of one node's ranks, as the supervisor finds them below itself, and what they last
reported.
"""

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

from guardrail.core.records import RankStatus
from guardrail.rundir import processes
from guardrail.rundir.rank_reports import FOLDER_VARIABLE, NODE_VARIABLE, NodeReports
from guardrail.rundir.run_directory import RunDirectory


def become_reaper() -> None:
    """Descendants whose parent dies become our children (prctl PR_SET_CHILD_SUBREAPER, Linux 3.4).

    So ranks that an elastic agent leaves behind are still found below us, whatever session they are
    in.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


class LocalRanks:
    """Children of the elastic agent.

    Args:
        run: the run directory.
        node_rank, nodes: which node this is, and of how many.

    Attributes:
        reports: pid -> last report of that process, None before its first. Live ranks only; empty
            between two incarnations.
        last_pids: pids of the newest incarnation, also when it has ended.
        heard: one of them has reported; from then on rank 0 writes the status, its last word
        included.
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
        # between a child that starts and one who looks at all children
        self._sparing = threading.Lock()
        self.reports: dict[int, RankStatus | None] = {}
        self.last_pids: set[int] = set()
        self.heard = False

    def begin(self) -> dict[str, str]:
        """Forget the ranks of an earlier elastic agent; returns what those of the next one need in
        their environment.

        They report to another folder: no report of an earlier start is ever found in it.
        """
        self.end()
        self._starts += 1
        self._reports = NodeReports.of_supervisor(
            self._run, node_rank=self._node_rank, nodes=self._nodes, start=self._starts
        )
        return {FOLDER_VARIABLE: str(self._reports.folder), NODE_VARIABLE: str(self._node_rank)}

    def end(self) -> None:
        """Leave the folder in which the ranks of the last agent reported."""
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
        """Write what the ranks of this node have reported to the run directory, if it is time."""
        reports = self._reports
        if reports is not None:
            with contextlib.suppress(OSError):  # the next one will get through
                reports.publish(now=now)

    def look(self, agent_pid: int) -> None:
        """Find who lives, and read what they report. A report of an earlier start carries another
        pid.
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
        """Read what the ranks report."""
        if self._reports is not None:
            self._last_reports.update({report.pid: report for report in self._reports.read()})
        self._numbers.update({pid: report.rank for pid, report in self._last_reports.items()})

    def last_report(self, pid: int) -> RankStatus | None:
        """What a rank of this agent has reported last, also when it is dead."""
        return self._last_reports.get(pid)

    @contextlib.contextmanager
    def spared(self, *arguments: Any, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A child of the supervisor that is no rank: neither swept, nor reaped, nor buried with
        them.

        Takes what `subprocess.Popen` takes.
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
        """All descendants but those that are spared, and theirs."""
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
        """CPU seconds that each live rank's process has used, and the pids of those that a signal
        has stopped.

        A process under a debugger is not among the latter, and counts as one that works.
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
        """Global rank of a process of this node; asks its environment if it has not reported
        yet.
        """
        if pid not in self._numbers and pid in self._processes:
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                self._numbers[pid] = int(self._processes[pid].environ()["RANK"])
        return self._numbers.get(pid)

    def tell(self, pid: int, number: signal.Signals) -> None:
        if pid in self._processes:
            processes.tell(self._processes[pid], number)

    def kill(self, pids: Collection[int] | None = None) -> None:
        """SIGKILL to the ranks, or to those of `pids`, and to whatever they started; the agent sees
        them fail.
        """
        ranks = [rank for pid, rank in self._processes.items() if pids is None or pid in pids]
        victims = list(ranks)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                victims += rank.children(recursive=True)
        processes.kill(victims)

    def sweep(self, *, kill: bool) -> None:
        """Reap orphans that came to us; with `kill`, end those that live: workers of a rank that
        has died.
        """
        for orphan in self._orphans:
            if not processes.alive(orphan):
                processes.reap(orphan)
            elif kill:
                processes.kill([orphan])

    def bury(self) -> list[psutil.Process]:
        """End and reap every descendant; returns those that the kernel cannot end."""
        self._processes, self.reports = {}, {}
        while left := self._children():
            if stuck := processes.kill(left):
                return stuck
        return []
