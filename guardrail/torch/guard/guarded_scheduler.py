"""The learning-rate scheduler, stepped by the guard alone."""

from __future__ import annotations

from typing import Any

from guardrail.core.errors import UsageError


class GuardedScheduler:
    """Steps a scheduler once for each applied update.

    Args:
        scheduler: anything with step(); None: there is none.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._expected: int | None = None  # position after its last step by the guard

    def advance(self) -> None:
        """Step the scheduler after an applied update.

        Raises:
            UsageError: the loop has stepped it too.
        """
        if self._scheduler is None:
            return
        if self._expected is not None and self._expected != self._position():
            raise UsageError(
                "the loop called scheduler.step() itself, and the guard steps the scheduler after "
                "each applied update. Remove scheduler.step() from the loop"
            )
        self._scheduler.step()
        self._expected = self._position()

    def restored(self) -> None:
        """Take over the position of a scheduler whose state was loaded."""
        self._expected = self._position()

    def _position(self) -> int | None:
        """Return how often a scheduler of torch was stepped; None for others."""
        position = getattr(self._scheduler, "last_epoch", None)
        if isinstance(position, int):
            return position
        return None
