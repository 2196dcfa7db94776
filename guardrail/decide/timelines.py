"""Which metric rows are current, and which a rollback or a restart has abandoned. Pure.

A timeline begins at the step of the state that was restored. The rows of earlier timelines after
that step are abandoned; they stay readable. There are two sources of the beginnings, which agree.
The journal has a beginning before the first row is written. The first row of a timeline has it even
if a full disk has lost the journal line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from guardrail.core.events.decisions import RolledBack, Undone
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Restarted

if TYPE_CHECKING:
    import numpy as np

# Steps and timelines are written as float64, which holds whole numbers exactly up to here.
LARGEST = 2.0**53


def valid_rows(steps: np.ndarray, timelines: np.ndarray) -> np.ndarray:
    """Return a mask of the rows whose step and timeline are numbers that a run can have.

    A damaged file has other rows too. A NaN timeline is that of a run without the column.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # of NaN
        return (np.abs(steps) < LARGEST) & ~(np.abs(timelines) >= LARGEST)


class TimelineIndex:
    """The step at which each timeline began; a later timeline ends the earlier ones there."""

    def __init__(self) -> None:
        self.begins: dict[int, int] = {}

    @property
    def newest(self) -> int:
        """Return the newest timeline."""
        return max(self.begins, default=0)

    def begin(self, timeline: int, step: int) -> None:
        """Record that a timeline began after a step."""
        self.begins[timeline] = min(step, self.begins.get(timeline, step))

    def add_events(self, events: Iterable[Event]) -> None:
        """Read the beginnings from `rollback`, `undo` and `restarted` lines."""
        for event in events:
            match event:
                case RolledBack() | Undone():
                    step, timeline = event.to_step, event.new_timeline
                    if step is not None and timeline is not None and min(step, timeline) >= 0:
                        self.begin(timeline, step)
                case Restarted():
                    self.begin(event.timeline_after, event.step)

    def add_rows(
        self, steps: np.ndarray, timelines: np.ndarray, *, from_start: bool = True
    ) -> None:
        """Read the beginnings from metric rows, in the order of the file.

        The first row of a timeline is the step after its beginning.

        Args:
            steps, timelines: columns of the rows.
            from_start: the first row given is the first of the file. Else it only says which
                timeline came before.
        """
        import numpy as np

        known = valid_rows(steps, timelines)
        if not known.all():
            steps, timelines = steps[known], timelines[known]
        if not len(steps):
            return
        firsts = np.flatnonzero(np.diff(timelines) > 0) + 1
        if from_start:
            firsts = np.concatenate(([0], firsts))
        for at in firsts.tolist():
            if steps[at] >= 1 and timelines[at] >= 1:
                self.begin(int(timelines[at]), int(steps[at]) - 1)

    def end(self, timeline: int) -> float:
        """Return the last step of `timeline` that is still current; infinity for the newest."""
        later = [step for other, step in self.begins.items() if other > timeline]
        return min(later, default=math.inf)

    def current(self, steps: np.ndarray, timelines: np.ndarray) -> np.ndarray:
        """Return a mask of the rows that are current.

        Rows of step 0 are never current: they are the zeros that a power failure leaves. Rows that
        are not valid are not current either.
        """
        import numpy as np

        if not len(steps):
            return np.zeros(0, dtype=bool)
        valid = valid_rows(steps, timelines)
        known = np.array(sorted(self.begins), dtype=np.float64)
        # ends[i] is the end of a timeline in [known[i-1], known[i]).
        ends = np.array([self.end(int(t)) for t in (-1, *known)])
        last = ends[np.searchsorted(known, timelines, side="right")]
        with np.errstate(invalid="ignore"):  # of NaN
            return valid & (steps <= last) & (steps >= 1)
