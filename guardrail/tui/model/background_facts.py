"""What stands around the curves: ranks, what they print, the settings, who else watches. Read by
the reader's thread.

Looking costs as little with a thousand ranks as with one: what takes long is looked at less often.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from guardrail.core.errors import RunDirectoryError
from guardrail.rundir.run_directory import MetricsView, RunDirectory
from guardrail.tui.model.logtail import LogTail, PrintedLine
from guardrail.tui.model.rank_health import Rank, RankTracker

if TYPE_CHECKING:
    from guardrail.tui.model.config_lines import ConfigLine

LOOK_SECONDS = 1.0
# of the time that looking may take: with a thousand ranks on a slow disk it is done every few
# seconds
SHARE = 0.05
WINDOW = 100  # newest rows in which the slowest rank is counted
_NAMED = 8


@dataclass(frozen=True)
class Background:
    """Attributes:
    ranks: by number. slowest: (rank, how many of the newest rows it was the slowest in), the most
    often first. printed: newest lines of all logs. settings: lines of the configuration. screens:
    that watch now, this one included. looked: when the ranks were last looked at, by the viewer's
    clock; until the next look nobody is missed.
    """

    ranks: tuple[Rank, ...] = ()
    slowest: tuple[tuple[int, int], ...] = ()
    printed: tuple[PrintedLine, ...] = ()
    settings: tuple[ConfigLine, ...] = ()
    screens: int = 0
    looked: float = math.inf


class BackgroundReader:
    """Looks around when it is time to.

    Args:
        clock: wall time, of the viewer.
        timer: seconds, for how long looking takes.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._clock, self._timer = run, clock, timer
        self._ranks, self._tail = RankTracker(), LogTail(run.logs)
        self._next = -1.0
        self._looks = 0
        self._config: tuple[int, int] | None = None
        self.around = Background()

    def look(self, *, ended: bool = False) -> bool:
        """Look if it is time; True if `around` says something new."""
        began = self._timer()
        if began < self._next:
            return False
        before = self.around
        now = self._clock()
        ranks = self._ranks.look(self._run.read_ranks(), now)
        printed = self._tail.lines if self._tail.look() else before.printed
        self.around = replace(
            before, ranks=ranks, printed=printed, screens=self._run.screens(), looked=now
        )
        if self._looks:  # the first frame waits for no schema
            self._look_at_settings()
        self._looks += 1
        took = self._timer() - began
        self._next = began + max(LOOK_SECONDS * (5 if ended else 1), took / SHARE)
        return self.around != before

    def look_at_rows(self, view: MetricsView | None) -> None:
        """Count which rank was the slowest in the newest rows."""
        if view is None or not len(view) or "slowest_rank" not in view.columns:
            return
        with np.errstate(invalid="ignore"):
            slowest = np.asarray(view.column("slowest_rank")[-WINDOW:])
            slowest = slowest[(slowest >= 0) & (slowest < 2**31)]
        found = Counter(slowest.astype(np.int64).tolist()).most_common(_NAMED)
        self.around = replace(self.around, slowest=tuple(found))

    def _look_at_settings(self) -> None:
        """The configuration, when its file is another: a resume may have changed it."""
        try:
            info = os.stat(self._run.path / "config.toml")
            if (info.st_mtime_ns, info.st_size) == self._config:
                return
            self._config = (info.st_mtime_ns, info.st_size)
            text = self._run.config_text(display=True)
        except (OSError, RunDirectoryError):
            return
        from guardrail.tui.model.config_lines import read_config_lines

        self.around = replace(self.around, settings=read_config_lines(text))
