"""A setting that a user changes while the run goes on, as a function of the step. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right


class StepSetting:
    """A value as a function of the step.

    A run that resumes from before a change meets the change again at the same step. After a
    rollback, a value that was set later than the restored step holds from that step on: it was set
    because of what happened.

    Attributes:
        default: the value before the first change.
        changes: (first step, value), ascending.
    """

    def __init__(self, default: float) -> None:
        self.default = default
        self.changes: list[tuple[int, float]] = []

    def at(self, step: int) -> float:
        """Return the value that holds at `step`."""
        index = bisect_right(self.changes, (step, math.inf))
        if index == 0:
            return self.default
        return self.changes[index - 1][1]

    def set(self, from_step: int, value: float) -> None:
        """Let `value` hold from `from_step` on."""
        self.changes = [change for change in self.changes if change[0] < from_step]
        self.changes.append((from_step, value))

    def rewind(self, to_step: int) -> None:
        """Take over a rollback to `to_step`."""
        later = [value for step, value in self.changes if step > to_step + 1]
        if later:
            self.set(to_step + 1, later[-1])
