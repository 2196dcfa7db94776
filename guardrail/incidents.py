"""Numbers incidents and says when one is over. Pure.

An incident is open from the first rejecting finding until `confirm` healthy steps have been applied from its last
one on. It outlives rollbacks, so it is no part of a snapshot; after a crash the journal gives it back (`resume`).
"""

from __future__ import annotations

OPEN, RECOVERED = "open", "recovered"


class Incidents:
    """Args:
    confirm: healthy applied steps after the last finding that end an incident.
    """

    def __init__(self, *, confirm: int) -> None:
        self.confirm = max(1, confirm)
        self.number = 0  # of the last incident
        self.open = False
        self.onset = 0
        self._last = 0  # step of the last finding
        self._healthy = 0

    def resume(self, number: int, *, is_open: bool = False, onset: int = 0, step: int = 0) -> None:
        """Go on after `number` incidents, the last one still open if `is_open`; `step` is that of its last finding."""
        self.number, self.open, self.onset, self._last, self._healthy = number, is_open, onset, step, 0

    def trouble(self, step: int, onset: int) -> tuple[int, str]:
        """A rejecting finding. Returns (number, "open" if it is a new incident else "")."""
        self._last, self._healthy = max(step, self._last), 0
        if self.open:
            self.onset = min(self.onset, onset)
            return self.number, ""
        self.number, self.open, self.onset = self.number + 1, True, onset
        return self.number, OPEN

    def healthy(self, step: int) -> tuple[int | None, str]:
        """A healthy applied step. Returns (number or None, "recovered" if that was the last one needed else "").

        Steps that are run again after a rollback count from the place of the trouble on.
        """
        if not self.open:
            return None, ""
        if step >= self._last:
            self._healthy += 1
        if self._healthy < self.confirm:
            return self.number, ""
        self.open = False
        return self.number, RECOVERED
