"""Ranks as a viewer sees them: silent, stuck or slow, by the viewer's own clock. Pure.

A rank's time stamps come from the clock of its host, which may be wrong by minutes. So what counts
is when this viewer last saw a heartbeat, or the count of progress, change.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from guardrail.core.records import Phase, RankStatus

SILENT_SECONDS = 15.0  # a rank says something each second
STUCK_SECONDS = 60.0  # the main thread got no further, although the rank's heart beats
SLOW = 1.25  # times the median from which on a rank is slow
_RESTING = (Phase.PAUSED, Phase.FINISHED, Phase.STOPPED, Phase.HALTED, Phase.FAILED)


@dataclass(frozen=True)
class Rank:
    """One rank. `heard` and `moved` are times of the viewer's clock at which its heartbeat and its
    progress changed.
    """

    told: RankStatus
    heard: float
    moved: float


@dataclass(frozen=True)
class RankHealth:
    """What a viewer thinks of a rank.

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
        """Worst first when sorted."""
        order = ("silent", "failed", "stuck", "slow", "")
        return (
            order.index(self.fault),
            -max(self.seconds, 0.0) or -self.ratio,
            self.rank.told.rank,
        )


class RankTracker:
    """Remembers when what a rank says last changed."""

    def __init__(self) -> None:
        self._known: dict[int, Rank] = {}

    def look(self, told: Iterable[RankStatus], now: float) -> tuple[Rank, ...]:
        """The ranks by number, after one more look at what they say."""
        found = {}
        for status in told:
            before = self._known.get(status.rank)
            if before is None or before.told.incarnation != status.incarnation:
                # What was there when we came may be old already; two times of one clock can be
                # compared.
                still = max(0.0, status.heartbeat - status.progress_time)
                found[status.rank] = Rank(status, min(status.heartbeat, now), now - still)
                continue
            if status == before.told:
                found[status.rank] = before
                continue
            heard = now if status.heartbeat != before.told.heartbeat else before.heard
            moved = now if status.progress != before.told.progress else before.moved
            found[status.rank] = Rank(status, heard, moved)
        self._known = found
        return tuple(found[number] for number in sorted(found))


def median_step_seconds(ranks: Sequence[Rank]) -> float:
    """Of the step times; NaN where no rank has one."""
    times = [rank.told.step_seconds for rank in ranks if rank.told.step_seconds > 0]
    return statistics.median(times) if times else math.nan


def assess_ranks(ranks: Sequence[Rank], now: float, *, ended: bool = False) -> list[RankHealth]:
    """What is the matter with each, in the same order.

    Args:
        ended: the run has ended; ranks that say nothing any more are no news.
    """
    usual = median_step_seconds(ranks)
    return [_judge(rank, usual, now, ended=ended) for rank in ranks]


def _judge(rank: Rank, usual: float, now: float, *, ended: bool) -> RankHealth:
    told = rank.told
    ratio = told.step_seconds / usual if usual > 0 and told.step_seconds > 0 else 1.0
    if told.phase is Phase.FAILED:
        return RankHealth(rank, ratio, "failed")
    if ended or told.phase in _RESTING:
        return RankHealth(rank, ratio)
    if (silence := now - rank.heard) > SILENT_SECONDS:
        return RankHealth(rank, ratio, "silent", silence)
    still = now - rank.moved
    if told.phase in (Phase.STEP, Phase.EVAL) and still > max(
        STUCK_SECONDS, 10 * told.step_seconds
    ):
        return RankHealth(rank, ratio, "stuck", still)
    return RankHealth(rank, ratio, "slow" if ratio >= SLOW else "")
