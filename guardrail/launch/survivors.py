"""Ranks that outlive a failed rank of their start: they wait for it, and are killed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from guardrail.core.records.status import Phase, RankStatus
from guardrail.launch.supervisor_journal import log
from guardrail.rundir.local_ranks import LocalRanks

SURVIVOR_SECONDS = 10.0  # a peer of a failed rank that still runs after this is killed
SETUP_SURVIVOR_SECONDS = 1.0  # the same for a peer in set-up, which has nothing to save


class Survivors:
    """Peers of a failed rank that were asked to end.

    The agent would give them 30 seconds. In a collective they wait for the failed rank, in set-up
    as long as launch.collective_timeout. Only pids that lived when it failed are killed.
    """

    def __init__(self, ranks: LocalRanks) -> None:
        self._ranks = ranks
        self._asked: dict[int, float] = {}  # pid -> time.monotonic() when it was asked to end

    def __bool__(self) -> bool:
        """Return whether a survivor may still run."""
        return bool(self._asked)

    def clear(self) -> None:
        """Forget all: a new agent starts."""
        self._asked.clear()

    def end(self, closing: Sequence[int]) -> None:
        """Kill the survivors whose time is over.

        Args:
            closing: pids that the agent asks to end now.
        """
        now = time.monotonic()
        for pid in closing:
            if pid not in self._asked:
                log(f"process {pid} is asked to end: a rank of the same start has failed")
                self._asked[pid] = now
        alive = self._ranks.reports
        for pid, since in list(self._asked.items()):
            if pid not in alive and since != now:
                del self._asked[pid]
            elif now - since > _patience(alive.get(pid)):
                self._ranks.kill([pid])


def _patience(report: RankStatus | None) -> float:
    if report is None or report.phase in (Phase.STARTING, Phase.SETUP):
        return SETUP_SURVIVOR_SECONDS
    return SURVIVOR_SECONDS
