"""What is shown beside the curves: ranks, their output, the configuration, who else watches.

The reader's thread reads it. It costs as little with a thousand ranks as with one: what takes long
is read less often.
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
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.logtail import LogTail, PrintedLine
from guardrail.tui.model.rank_health import Rank, RankTracker

if TYPE_CHECKING:
    from guardrail.tui.model.config_lines import ConfigLine

READ_SECONDS = 1.0  # between two reads
ENDED_READ_SECONDS = 5.0  # ... of a run that has ended
# of the time that reading may take: a thousand ranks on a slow disk are read every few seconds
SHARE = 0.05
WINDOW = 100  # newest rows in which the slowest rank is counted
_NAMED = 8  # ranks whose count is kept


@dataclass(frozen=True)
class Background:
    """What one read has found.

    Attributes:
        ranks: by number.
        slowest: (rank, in how many of the newest rows it was the slowest), the most often first.
        printed: newest lines of all logs.
        settings: lines of the configuration.
        screens: that are attached now, this one included.
        looked: when the ranks were read, by the viewer's clock. No rank counts as silent after it.
    """

    ranks: tuple[Rank, ...] = ()
    slowest: tuple[tuple[int, int], ...] = ()
    printed: tuple[PrintedLine, ...] = ()
    settings: tuple[ConfigLine, ...] = ()
    screens: int = 0
    looked: float = math.inf


class BackgroundReader:
    """Reads the background of a run when it is time to.

    Args:
        clock: wall time, of the viewer.
        timer: seconds, for how long reading takes.

    Attributes:
        around: what the last read has found.
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
        self._is_first = True
        self._config: tuple[int, int] | None = None  # time and size of the file that was read
        self.around = Background()

    def look(self, *, ended: bool = False) -> bool:
        """Read if it is time; return whether `around` has changed."""
        began = self._timer()
        if began < self._next:
            return False
        before = self.around
        now = self._clock()
        ranks = self._ranks.update(self._run.read_ranks(), now)
        printed = self._tail.lines if self._tail.read_new_lines() else before.printed
        self.around = replace(
            before, ranks=ranks, printed=printed, screens=self._run.screens(), looked=now
        )
        if not self._is_first:  # the first frame does not wait for the schema to be imported
            self._read_config()
        self._is_first = False
        took = self._timer() - began
        pause = ENDED_READ_SECONDS if ended else READ_SECONDS
        self._next = began + max(pause, took / SHARE)
        return self.around != before

    def count_slowest(self, view: MetricsView | None) -> None:
        """Count in how many of the newest rows each rank was the slowest."""
        if view is None or not len(view) or "slowest_rank" not in view.columns:
            return
        with np.errstate(invalid="ignore"):
            slowest = np.asarray(view.column("slowest_rank")[-WINDOW:])
            slowest = slowest[(slowest >= 0) & (slowest < 2**31)]
        counts = Counter(slowest.astype(np.int64).tolist()).most_common(_NAMED)
        self.around = replace(self.around, slowest=tuple(counts))

    def _read_config(self) -> None:
        """Read the configuration when its file has changed: a resume may have done it."""
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
