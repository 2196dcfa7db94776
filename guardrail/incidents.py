"""Numbers incidents, and says when one is over and how it ended. Pure.

An incident is open from the first rejecting finding until `confirm` healthy steps have been applied from its last
one on. A loss that is still above what was expected then gets `PATIENCE` times as long to come back. An incident
outlives rollbacks, so it is no part of a snapshot; after a crash the journal gives it back (`resume`).

    open        trouble, and what is done about it
    recurred    the same place has spiked again behind a rollback: the next rung of the ladder; it stays open
    recovered   the loss is where its curve before the onset leads, or nothing says otherwise
    offset      over, but the loss has stayed above that curve
"""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.enough import LEAST, compare
from guardrail.records import Curve, Outcome

OPEN, RECOVERED, OFFSET, RECURRED = "open", "recovered", "offset", "recurred"
CLOSED = (RECOVERED, OFFSET)
PATIENCE = 4


class Incidents:
    """Args:
    confirm: healthy applied steps after the last finding that end an incident.
    """

    def __init__(self, *, confirm: int) -> None:
        self.confirm = max(1, confirm)
        self.number = 0  # of the last incident
        self.open = False
        self.onset = 0
        self.curve: Curve | None = None  # of the loss before the onset
        self.outcome: Outcome | None = None  # of the last incident that was closed
        self._last = 0  # step of the last finding
        self._healthy = 0

    def resume(
        self, number: int, *, is_open: bool = False, onset: int = 0, step: int = 0, curve: Curve | None = None
    ) -> None:
        """Go on after `number` incidents, the last one still open if `is_open`; `step` is that of its last finding."""
        self.number, self.open, self.onset, self._last, self._healthy = number, is_open, onset, step, 0
        self.curve = curve if is_open else None

    def trouble(self, step: int, onset: int, *, curve: Curve | None = None) -> tuple[int, str]:
        """A rejecting finding. Returns (number, "open" if it is a new incident else "").

        Args:
            curve: of the loss before the onset, for an incident that begins.
        """
        self._last, self._healthy = max(step, self._last), 0
        if self.open:
            self.onset = min(self.onset, onset)
            return self.number, ""
        self.number, self.open, self.onset = self.number + 1, True, onset
        self.curve, self.outcome = curve, None
        return self.number, OPEN

    def healthy(
        self, step: int, losses: Sequence[tuple[int, float]] = (), *, every_step: bool = False
    ) -> tuple[int | None, str]:
        """A healthy applied step. Returns (number or None, how it ended if that was the last one needed else "").

        Steps that are run again after a rollback count from the place of the trouble on.

        Args:
            losses: (step, loss) of accepted steps, this one included.
            every_step: each step from the place of the trouble up to this one was applied, which a crash in between
                cannot change; else those are counted that have been told.
        """
        if not self.open:
            return None, ""
        if step >= self._last:
            self._healthy = step - self._last + 1 if every_step else self._healthy + 1
        if self._healthy < self.confirm:
            return self.number, ""
        newest = max(self.confirm, LEAST)
        outcome = compare(self.curve, [pair for pair in losses if pair[0] >= self._last][-newest:])
        lasting = outcome is not None and outcome.lasting
        if lasting and self._healthy < PATIENCE * newest:
            return self.number, ""
        self.open, self.outcome = False, outcome
        return self.number, OFFSET if lasting else RECOVERED
