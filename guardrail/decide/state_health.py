"""Which states of the run are healthy, and what is not over. Pure."""

from __future__ import annotations

import statistics

from guardrail.core.records.status import Unresolved
from guardrail.core.records.verdicts import Mode
from guardrail.decide.controller_state import ControllerState
from guardrail.decide.recovery import MOST, expected_loss


class StateHealth:
    """Judges the states of a run by its detectors and incidents."""

    def __init__(self, state: ControllerState) -> None:
        self._state = state

    @property
    def healthy_through(self) -> int:
        """Return the newest applied step that is surely healthy; 0: there is none.

        No detector suspects it, and it is before every incident that is not over.
        """
        since = self._state.memory.incidents.since
        through = self.unsuspected_through
        return through if since is None else min(through, since - 1)

    @property
    def unsuspected_through(self) -> int:
        """Return the newest applied step that no detector suspects; 0: there is none.

        Detectors learn a level that stays.
        """
        last = self._state.steps.last_step
        if not last or self._state.mode is Mode.OFF:
            return last
        suspected = self._state.detectors.first_suspect_step()
        return last if suspected is None else suspected - 1

    def is_good(self, step: int) -> bool:
        """Return whether the state after `step` updates is good.

        Enough healthy steps have followed, and no incident contains it.
        """
        if step + self._state.settings.steps_until_good > self.healthy_through:
            return False
        return not self._state.memory.incidents.is_within(step)

    def is_settled(self, step: int) -> bool:
        """Return whether the state after `step` updates were good without unresolved incidents.

        A rollback for another incident may restore such a state: the run was like that before it.
        States from before the unresolved incident may be thousands of steps old.
        """
        incidents = self._state.memory.incidents
        if not incidents.unresolved:
            return False
        if step + self._state.settings.steps_until_good > self.unsuspected_through:
            return False
        return not incidents.is_within(step, but_unresolved=True)

    def find_unresolved(self) -> Unresolved | None:
        """Return the earliest incident that is not over, by the numbers; None: there is none.

        The journal knows what was done about it.
        """
        incidents, steps = self._state.memory.incidents, self._state.steps
        since = incidents.since
        if since is None:
            return None
        ended = next((one for one in incidents.unresolved if one.onset == since), None)
        number, curve = incidents.number, incidents.curve
        if ended is not None:
            number, curve = ended.number, ended.curve
        expected: float | None = None
        if curve is not None:
            last = steps.last_step or since
            expected = expected_loss(curve, min(max(last, 1), since + MOST))
        losses = steps.newest_losses(since)
        return Unresolved(
            incident=number,
            since=since,
            is_open=ended is None,
            loss=statistics.median(losses) if losses else None,
            expected=expected,
        )
