"""When a rank counts as hung. Pure: the caller gives the heartbeats and the time that has passed.

A slow rank still reports, because its heartbeat has its own thread. It has the deadline of its
phase. A process that is stopped (SIGSTOP, swapped out) reports nothing and uses no CPU time. It has
30 seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from guardrail.core.records.status import Phase, RankStatus
from guardrail.core.sections import LaunchSection

# A process that has done nothing for this long, while its peers wait, is stopped.
SILENT_SECONDS = 30.0
# Of several hung ranks, one whose process has done nothing for this long is the cause.
CULPRIT_SILENT_SECONDS = 5.0
WAITING_SECONDS = 5.0  # a peer without progress for this long waits
# One look adds at most so many seconds, however long this process was stopped or the machine slept.
LONGEST_LOOK = 5.0


@dataclass(frozen=True, kw_only=True)
class Hung:
    """A rank without progress for longer than its phase allows, or whose process is stopped.

    Attributes:
        rank: None if it never reported.
        seconds: since its last progress.
        silent: seconds in which its process has neither reported nor used CPU time.
        stopped: whether the process is stopped.
    """

    pid: int
    rank: int | None
    phase: Phase
    seconds: float
    silent: float = 0.0
    stopped: bool = False


@dataclass
class _Seen:
    """What the last looks showed of one process.

    Attributes:
        progress: phase and progress that it reported last.
        activity: its last heartbeat, and the CPU seconds that it has used.
        idle: seconds without progress.
        silent: seconds without activity.
    """

    progress: tuple[Phase, int] | None
    activity: tuple[float, float]
    idle: float = 0.0
    silent: float = 0.0


class HangDetector:
    """Counts the seconds in which each process showed no progress.

    It compares (phase, progress) of two looks, and never reads the time stamps inside. So neither a
    clock that jumps nor a laptop that slept makes a rank look hung.
    """

    def __init__(self, launch: LaunchSection) -> None:
        self._deadlines = {
            Phase.STARTING: launch.setup_timeout,
            Phase.SETUP: launch.setup_timeout,
            Phase.STEP: launch.step_timeout,
            Phase.EVAL: launch.eval_timeout,
            Phase.SAVE: launch.save_timeout,
            Phase.ROLLBACK: launch.save_timeout,  # may read a checkpoint from disk
            Phase.PAUSED: launch.step_timeout,  # a paused rank still runs its loop
        }
        # from the last report to the end of the process
        self._ended_seconds = launch.save_timeout
        self._seen: dict[int, _Seen] = {}

    def find_hung(
        self,
        ranks: Mapping[int, RankStatus | None],
        seconds: float,
        *,
        cpu_seconds: Mapping[int, float] | None = None,
        stopped: Collection[int] = (),
    ) -> list[Hung]:
        """Take in one look, and return the ranks over their deadline, the longest idle first.

        Each is returned once; then its count starts again at 0.

        Args:
            ranks: pid -> last report of that rank, None for one that has not reported yet.
            seconds: since the last look.
            cpu_seconds: pid -> CPU seconds that its process has used, where that is known.
            stopped: pids whose process a signal has stopped.
        """
        seconds = min(seconds, LONGEST_LOOK)
        used = cpu_seconds or {}
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in ranks}
        for pid, status in ranks.items():
            self._count(pid, status, seconds, used.get(pid, 0.0), is_stopped=pid in stopped)
        hung = []
        for pid, status in ranks.items():
            if found := self._check_deadline(pid, status, is_stopped=pid in stopped):
                hung.append(found)
        for one in hung:
            self._seen[one.pid].idle = self._seen[one.pid].silent = 0.0
        return sorted(hung, key=lambda one: -one.seconds)

    def _check_deadline(
        self, pid: int, status: RankStatus | None, *, is_stopped: bool
    ) -> Hung | None:
        seen = self._seen[pid]
        rank, phase = None, Phase.STARTING
        if status is not None:
            rank, phase = status.rank, status.phase
        limit = self._deadlines.get(phase, self._ended_seconds)
        if status is not None and status.closed:
            limit = self._ended_seconds
        is_silent = seen.silent > SILENT_SECONDS and (is_stopped or self._others_wait(pid))
        if not is_silent and seen.idle <= limit:
            return None
        return Hung(
            pid=pid,
            rank=rank,
            phase=phase,
            seconds=seen.idle,
            silent=seen.silent,
            stopped=is_silent,
        )

    def _count(
        self, pid: int, status: RankStatus | None, seconds: float, cpu: float, *, is_stopped: bool
    ) -> None:
        progress, heartbeat = None, 0.0
        if status is not None:
            progress, heartbeat = (status.phase, status.progress), status.heartbeat
        activity = (heartbeat, cpu)
        seen = self._seen.get(pid)
        if seen is None:
            self._seen[pid] = _Seen(progress, activity)
            return
        is_idle = seen.progress == progress
        seen.idle = seen.idle + seconds if is_idle else 0.0
        # A rank that has not reported yet may wait for a slow disk to import from. One that has
        # closed reports no more.
        reports = heartbeat > 0.0 and status is not None and not status.closed
        is_silent = seen.activity == activity and (reports or is_stopped)
        seen.silent = seen.silent + seconds if is_silent else 0.0
        seen.progress, seen.activity = progress, activity

    def _others_wait(self, pid: int) -> bool:
        others = (seen for other, seen in self._seen.items() if other != pid)
        return all(seen.idle >= WAITING_SECONDS for seen in others)


def find_culprit(hung: Sequence[Hung], reports: Mapping[int, RankStatus | None]) -> Hung:
    """Return the rank for which the others wait, of ranks that hang together.

    That is one that never reported; else one whose process is stopped or silent; else the one with
    the least progress.

    Args:
        reports: pid -> last report of each live rank.
    """
    for one in hung:
        if reports.get(one.pid) is None:
            return one
    stillest = max(hung, key=lambda one: one.silent)
    if stillest.stopped or stillest.silent > CULPRIT_SILENT_SECONDS:
        return stillest

    def progress(one: Hung) -> tuple[int, int]:
        report = reports[one.pid]
        assert report is not None
        return report.step, report.progress

    return min(hung, key=progress)
