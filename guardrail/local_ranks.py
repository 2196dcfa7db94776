"""The processes of one node's ranks, as the supervisor finds them below itself, and what they last reported."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from guardrail import processes
from guardrail.records import RankStatus
from guardrail.rundir import RunDirectory


def become_reaper() -> None:
    """Descendants whose parent dies become our children (prctl PR_SET_CHILD_SUBREAPER, Linux 3.4).

    So ranks that an elastic agent leaves behind are still found below us, whatever session they are in.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


class LocalRanks:
    """Children of the elastic agent.

    Attributes:
        reports: pid -> last report of that process, None before its first. Live ranks only; empty between two
            incarnations.
        last_pids: pids of the newest incarnation, also when it has ended.
        heard: one of them has reported; from then on rank 0 writes the status, its last word included.
    """

    def __init__(self, run: RunDirectory, host: str) -> None:
        self._run, self._host = run, host
        self._myself = psutil.Process()
        self._processes: dict[int, psutil.Process] = {}
        self._numbers: dict[int, int] = {}
        self._orphans: list[psutil.Process] = []
        self._spared: set[int] = set()
        self._sparing = threading.Lock()  # between a child that starts and one who looks at all children
        self.reports: dict[int, RankStatus | None] = {}
        self.last_pids: set[int] = set()
        self.heard = False

    def look(self, agent_pid: int) -> None:
        """Find who lives, and read what they report. A report of an earlier incarnation carries another pid."""
        found, self._orphans = {}, []
        for process in self._children():
            with contextlib.suppress(psutil.Error):
                parent = process.ppid()
                if parent == agent_pid and processes.alive(process):
                    found[process.pid] = process
                elif parent == self._myself.pid and process.pid != agent_pid:
                    self._orphans.append(process)
        reports = {report.pid: report for report in self._run.read_ranks() if report.host == self._host}
        self._numbers.update({pid: report.rank for pid, report in reports.items()})
        self._processes = found
        self.reports = {pid: reports.get(pid) for pid in found}
        if found:
            same = not self.last_pids.isdisjoint(found)
            self.last_pids = self.last_pids | found.keys() if same else set(found)
            self.heard = bool(self.registered) or (self.heard and same)

    @contextlib.contextmanager
    def spared(self, *arguments: Any, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A child of the supervisor that is no rank: neither swept, nor reaped, nor buried with them.

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

    def number(self, pid: int) -> int | None:
        """Global rank of a process of this node; asks its environment if it has not reported yet."""
        if pid not in self._numbers and pid in self._processes:
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                self._numbers[pid] = int(self._processes[pid].environ()["RANK"])
        return self._numbers.get(pid)

    def tell(self, pid: int, number: signal.Signals) -> None:
        if pid in self._processes:
            processes.tell(self._processes[pid], number)

    def kill(self) -> None:
        """SIGKILL to the ranks and whatever they started; the agent sees them fail."""
        victims = list(self._processes.values())
        for rank in self._processes.values():
            with contextlib.suppress(psutil.Error):
                victims += rank.children(recursive=True)
        processes.kill(victims)

    def sweep(self, *, kill: bool) -> None:
        """Reap orphans that came to us; with `kill`, end those that live: workers of a rank that has died."""
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
