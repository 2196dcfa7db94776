"""When a rank counts as hung. Pure: the caller brings the heartbeats and says how much time has
passed.

A slow rank still reports: its heartbeat is a thread of its own. It has the deadline of its phase. A
process that is stopped (SIGSTOP, swapped out) reports nothing and uses no CPU time; it has 30
seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from guardrail.core.records import Phase, RankStatus
from guardrail.core.sections import LaunchSection

# a process that has done nothing for this long, while its peers wait, is stopped
SILENT_SECONDS = 30.0
WAITING_SECONDS = 5.0  # a peer that has not got ahead for this long waits
# seconds that one look may add, however long the watcher itself was stopped or the machine slept
LONGEST_LOOK = 5.0


@dataclass(frozen=True, kw_only=True)
class Hung:
    """A rank that has not got ahead for longer than its phase allows, or whose process is stopped.

    Attributes:
        rank: None if it never reported.
        seconds: since it got ahead.
        silent: seconds in which its process has neither reported nor used CPU time.
        stopped: whether that is why.
    """

    pid: int
    rank: int | None
    phase: Phase
    seconds: float
    silent: float = 0.0
    stopped: bool = False


@dataclass
class _Seen:
    mark: tuple[Phase, int] | None
    sign: tuple[float, float]  # last heartbeat, CPU seconds used
    idle: float = 0.0
    silent: float = 0.0


class HangDetector:
    """Counts the seconds in which each process showed no progress.

    It goes by changes of (phase, progress) between two looks and not by the time stamps inside, so
    that neither a clock that jumps nor a laptop that slept makes a rank look hung.
    """

    def __init__(self, launch: LaunchSection) -> None:
        self._deadlines = {
            Phase.STARTING: launch.setup_timeout,
            Phase.SETUP: launch.setup_timeout,
            Phase.STEP: launch.step_timeout,
            Phase.EVAL: launch.eval_timeout,
            Phase.SAVE: launch.save_timeout,
            Phase.ROLLBACK: launch.save_timeout,  # may read a checkpoint from disk
            Phase.PAUSED: launch.step_timeout,  # a parked rank still turns its loop
        }
        # between the last word and the end of the process
        self._ended_seconds = launch.save_timeout
        self._seen: dict[int, _Seen] = {}

    def look(
        self,
        ranks: Mapping[int, RankStatus | None],
        seconds: float,
        *,
        cpu: Mapping[int, float] | None = None,
        stopped: Collection[int] = (),
    ) -> list[Hung]:
        """Take in one look.

        Args:
            ranks: pid -> what that rank last reported, None for one that has not reported yet.
            seconds: since the last look.
            cpu: pid -> CPU seconds that its process has used, where that is known.
            stopped: pids whose process a signal has stopped.

        Returns:
            Those over their deadline, the longest idle first. They are reported once, then the
            count starts anew.
        """
        seconds = min(seconds, LONGEST_LOOK)
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in ranks}
        for pid, status in ranks.items():
            self._count(pid, status, seconds, (cpu or {}).get(pid, 0.0), is_stopped=pid in stopped)
        hung = []
        for pid, status in ranks.items():
            seen = self._seen[pid]
            phase = status.phase if status else Phase.STARTING
            limit = self._deadlines.get(phase, self._ended_seconds)
            if status is not None and status.closed:
                limit = self._ended_seconds
            is_silent = seen.silent > SILENT_SECONDS and (pid in stopped or self._others_wait(pid))
            if is_silent or seen.idle > limit:
                hung.append(
                    Hung(
                        pid=pid,
                        rank=status.rank if status else None,
                        phase=phase,
                        seconds=seen.idle,
                        silent=seen.silent,
                        stopped=is_silent,
                    )
                )
        for one in hung:
            self._seen[one.pid].idle = self._seen[one.pid].silent = 0.0
        return sorted(hung, key=lambda one: -one.seconds)

    def _count(
        self, pid: int, status: RankStatus | None, seconds: float, cpu: float, *, is_stopped: bool
    ) -> None:
        mark = (status.phase, status.progress) if status else None
        sign = (status.heartbeat if status else 0.0, cpu)
        seen = self._seen.get(pid)
        if seen is None:
            self._seen[pid] = _Seen(mark, sign)
            return
        seen.idle = seen.idle + seconds if seen.mark == mark else 0.0
        # One that has not reported yet may wait for a slow disk to import from; one that has closed
        # reports no more.
        reports = sign[0] > 0.0 and status is not None and not status.closed
        seen.silent = (
            seen.silent + seconds if seen.sign == sign and (reports or is_stopped) else 0.0
        )
        seen.mark, seen.sign = mark, sign

    def _others_wait(self, pid: int) -> bool:
        return all(
            seen.idle >= WAITING_SECONDS for other, seen in self._seen.items() if other != pid
        )
