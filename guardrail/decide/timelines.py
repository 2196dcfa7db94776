"""Which metric rows tell the present and which were abandoned by a rollback or a restart. Pure.

A timeline begins at the step of the state it was restored from. What earlier timelines did beyond
that step is abandoned; it stays readable. Both sources of the beginnings agree, and either may come
first: the journal says it before a row is there, the first row of a timeline says it where a
journal line was lost to a full disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from guardrail.core.events.event import Event
from guardrail.core.files import as_int

if TYPE_CHECKING:
    import numpy as np

# float64, as which steps and timelines are written, holds whole numbers exactly up to here
LARGEST = 2.0**53


def sensible(steps: np.ndarray, timelines: np.ndarray) -> np.ndarray:
    """Mask of the rows whose step and timeline are numbers that a run can have. A damaged file has
    others too.

    A timeline that is NaN is that of a run without the column.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # of NaN
        return (np.abs(steps) < LARGEST) & ~(np.abs(timelines) >= LARGEST)


class TimelineIndex:
    """The step at which each timeline began; later timelines cut off earlier ones there."""

    def __init__(self) -> None:
        self.begins: dict[int, int] = {}

    @property
    def newest(self) -> int:
        return max(self.begins, default=0)

    def begin(self, timeline: int, step: int) -> None:
        self.begins[timeline] = min(step, self.begins.get(timeline, step))

    def add_events(self, events: Iterable[Event]) -> None:
        """Learn from `rollback` and `undo` (to_step, new_timeline) and `restarted` (step) lines;
        others say nothing.
        """
        for event in events:
            if event.kind in ("rollback", "undo"):
                step, timeline = (
                    as_int(event.data.get(name), -1) for name in ("to_step", "new_timeline")
                )
                if step >= 0 and timeline >= 0:
                    self.begin(timeline, step)
            elif event.kind == "restarted":
                self.begin(as_int(event.data.get("new_timeline"), event.timeline), event.step)

    def add_rows(
        self, steps: np.ndarray, timelines: np.ndarray, *, from_start: bool = True
    ) -> None:
        """Learn from metric rows in file order: the first row of a timeline is the step after its
        beginning.

        Args:
            steps, timelines: columns of the rows.
            from_start: the first row given is the first of the file; else it only tells which
            timeline went before.
        """
        import numpy as np

        known = sensible(steps, timelines)
        if not known.all():
            steps, timelines = steps[known], timelines[known]
        if not len(steps):
            return
        firsts = np.flatnonzero(np.diff(timelines) > 0) + 1
        firsts = np.concatenate(([0], firsts)) if from_start else firsts
        for at in firsts.tolist():
            if steps[at] >= 1 and timelines[at] >= 1:
                self.begin(int(timelines[at]), int(steps[at]) - 1)

    def end(self, timeline: int) -> float:
        """The last step of `timeline` that is still the present; infinity for the newest."""
        return min(
            (step for other, step in self.begins.items() if other > timeline), default=math.inf
        )

    def current(self, steps: np.ndarray, timelines: np.ndarray) -> np.ndarray:
        """Mask of the rows that tell the present. Rows of step 0 are the zeros a power failure
        leaves: never. Nor are rows that are not sensible."""
        import numpy as np

        if not len(steps):
            return np.zeros(0, dtype=bool)
        good = sensible(steps, timelines)
        known = np.array(sorted(self.begins), dtype=np.float64)
        # of a timeline in [known[i-1], known[i])
        ends = np.array([self.end(int(t)) for t in (-1, *known)])
        with np.errstate(invalid="ignore"):  # of NaN
            return (
                good
                & (steps <= ends[np.searchsorted(known, timelines, side="right")])
                & (steps >= 1)
            )
