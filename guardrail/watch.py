"""When a rank counts as hung. Pure: the caller brings the heartbeats and says how much time has passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from guardrail.config import LaunchSection
from guardrail.records import Phase, RankStatus

LONGEST_LOOK = 5.0  # seconds that one look may add, however long the watcher itself was stopped or the machine slept


@dataclass(frozen=True, kw_only=True)
class Hung:
    """A rank that has not got ahead for longer than its phase allows. `rank` is None if it never reported."""

    pid: int
    rank: int | None
    phase: Phase
    seconds: float


@dataclass
class _Seen:
    mark: tuple[Phase, int] | None
    idle: float = 0.0


class Watch:
    """Counts the seconds in which each process showed no progress.

    It goes by changes of (phase, progress) between two looks and not by the time stamps inside, so that neither a
    clock that jumps nor a laptop that slept makes a rank look hung.
    """

    def __init__(self, launch: LaunchSection) -> None:
        self._deadlines = {
            Phase.STARTING: launch.setup_seconds,
            Phase.SETUP: launch.setup_seconds,
            Phase.STEP: launch.step_seconds,
            Phase.EVAL: launch.eval_seconds,
            Phase.SAVE: launch.save_seconds,
            Phase.ROLLBACK: launch.save_seconds,  # may read a checkpoint from disk
            Phase.PAUSED: launch.step_seconds,  # a parked rank still turns its loop
        }
        self._ended_seconds = launch.save_seconds  # between the last word and the end of the process
        self._seen: dict[int, _Seen] = {}

    def look(self, ranks: Mapping[int, RankStatus | None], seconds: float) -> list[Hung]:
        """Take in one look.

        Args:
            ranks: pid -> what that rank last reported, None for one that has not reported yet.
            seconds: since the last look.

        Returns:
            Those over their deadline, the longest idle first. They are reported once, then the count starts anew.
        """
        seconds = min(seconds, LONGEST_LOOK)
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in ranks}
        hung = []
        for pid, status in ranks.items():
            mark = (status.phase, status.progress) if status else None
            seen = self._seen.get(pid)
            if seen is None or seen.mark != mark:
                self._seen[pid] = _Seen(mark)
                continue
            seen.idle += seconds
            phase = status.phase if status else Phase.STARTING
            if seen.idle > self._deadlines.get(phase, self._ended_seconds):
                hung.append(Hung(pid=pid, rank=status.rank if status else None, phase=phase, seconds=seen.idle))
                seen.idle = 0.0
        return sorted(hung, key=lambda one: -one.seconds)
