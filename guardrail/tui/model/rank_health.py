"""Whether a rank is silent, failed, stuck or slow, by the viewer's clock. Pure.

A rank's time stamps come from the clock of its host, which may be wrong by minutes. So the viewer's
time counts at which a heartbeat or a count of progress was last seen to change.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from guardrail.core.records.status import Phase, RankStatus

SILENT_SECONDS = 15.0  # a rank sends a heartbeat each second
STUCK_SECONDS = 60.0  # without progress of the main thread, while heartbeats go on
STUCK_STEPS = 10  # a slow rank is stuck only after so many of its steps
SLOW = 1.25  # times the median from which on a rank is slow
_IDLE = (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED, Phase.HALTED, Phase.FAILED)
_WORST_FIRST = ("silent", "failed", "stuck", "slow", "")


@dataclass(frozen=True)
class Rank:
    """One rank.

    Attributes:
        status: what it reported last.
        heard, moved: when its heartbeat and its progress last changed, by the viewer's clock.
    """

    status: RankStatus
    heard: float
    moved: float


@dataclass(frozen=True)
class RankHealth:
    """The state of a rank.

    Attributes:
        ratio: its step time over the median of all; 1 where it has none.
        fault: "silent", "failed", "stuck", "slow" or "".
        seconds: how long it has been silent or stuck.
    """

    rank: Rank
    ratio: float
    fault: str = ""
    seconds: float = 0.0

    @property
    def weight(self) -> tuple[int, float, int]:
        """A key that sorts the worst rank first."""
        badness = max(self.seconds, 0.0) or self.ratio
        return (_WORST_FIRST.index(self.fault), -badness, self.rank.status.rank)


class RankTracker:
    """Remembers when the reports of each rank last changed."""

    def __init__(self) -> None:
        self._known: dict[int, Rank] = {}

    def update(self, reports: Iterable[RankStatus], now: float) -> tuple[Rank, ...]:
        """Take the newest reports; return the ranks by number."""
        self._known = {status.rank: self._tracked(status, now) for status in reports}
        return tuple(self._known[number] for number in sorted(self._known))

    def _tracked(self, status: RankStatus, now: float) -> Rank:
        before = self._known.get(status.rank)
        if before is None or before.status.incarnation != status.incarnation:
            # The first report may be old already. Its two times come from one clock, so their
            # difference is right.
            still = max(0.0, status.heartbeat - status.progress_time)
            return Rank(status, min(status.heartbeat, now), now - still)
        if status == before.status:
            return before
        heard = now if status.heartbeat != before.status.heartbeat else before.heard
        moved = now if status.progress != before.status.progress else before.moved
        return Rank(status, heard, moved)


def median_step_seconds(ranks: Sequence[Rank]) -> float:
    """Return the median of the step times; NaN where no rank has one."""
    times = [rank.status.step_seconds for rank in ranks if rank.status.step_seconds > 0]
    return statistics.median(times) if times else math.nan


def assess_ranks(ranks: Sequence[Rank], now: float, *, ended: bool = False) -> list[RankHealth]:
    """Return the health of each rank, in the same order.

    Args:
        ended: the run has ended: its ranks are silent, and that is no fault.
    """
    median = median_step_seconds(ranks)
    return [_assess(rank, median, now, ended=ended) for rank in ranks]


def _assess(rank: Rank, median: float, now: float, *, ended: bool) -> RankHealth:
    status = rank.status
    ratio = 1.0
    if median > 0 and status.step_seconds > 0:
        ratio = status.step_seconds / median
    if status.phase is Phase.FAILED:
        return RankHealth(rank, ratio, "failed")
    if ended or status.phase in _IDLE:
        return RankHealth(rank, ratio)
    silence, still = now - rank.heard, now - rank.moved
    if silence > SILENT_SECONDS:
        return RankHealth(rank, ratio, "silent", silence)
    works = status.phase in (Phase.STEP, Phase.EVAL)
    if works and still > max(STUCK_SECONDS, STUCK_STEPS * status.step_seconds):
        return RankHealth(rank, ratio, "stuck", still)
    return RankHealth(rank, ratio, "slow" if ratio >= SLOW else "")
