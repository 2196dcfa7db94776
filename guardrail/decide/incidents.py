"""Numbers incidents, decides when one is over and how it ended, and which states are part of one.

Pure. An incident is open from the first rejecting finding until `confirm` healthy steps have been
applied from its last finding on. If the loss is still above the trend then, the incident stays open
up to `PATIENCE` times as long. An incident continues over rollbacks, so it is not part of a
snapshot; after a crash the journal restores it (`resume`).

    open        an anomaly, and what is done about it
    repeated    the same place has spiked again after a rollback: the next remedy is used; it stays
                open
    recovered   the loss is on its trend from before the onset, or there is no trend to compare
    recovered with higher loss
                it has ended, but the loss has stayed above that trend. It is unresolved until the
                loss is back ("recovered") or a user accepts the loss ("accepted")

No state from the onset on becomes good before the incident has recovered or is accepted. That holds
also if a user had its updates applied. A state from within the incident never becomes good; only
later states do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from guardrail.core.events.decisions import ACCEPTED, HIGHER_LOSS, OPEN, RECOVERED
from guardrail.core.records.verdicts import LossTrend, RecoveryResult
from guardrail.decide.recovery import LEAST, MOST, compare_with_trend

PATIENCE = 4


class Ended(NamedTuple):
    """An incident that is no longer open.

    Attributes:
        onset: its first step; the states from there on are damaged.
        until: the state after this step is the first that may become good. None: unresolved.
        curve: trend of the loss before the onset.
        accepted: by a user.
    """

    number: int
    onset: int
    until: int | None
    curve: LossTrend | None = None
    accepted: bool = False


class Incidents:
    """The incidents of one run.

    Args:
        confirm: healthy applied steps after the last finding that end an incident.

    Attributes:
        number: of the last incident.
        open: whether it is open.
        onset, curve: its first step, and the trend of the loss before that.
        outcome: how the loss compared at the end of the last incident.
        ended: incidents by their end; unresolved ones come last.
        unresolved: those that have ended with a loss above the trend, which is not back and which
            no user has accepted.
    """

    def __init__(self, *, confirm: int) -> None:
        self.confirm = max(1, confirm)
        self.number = 0
        self.open = False
        self.onset = 0
        self.curve: LossTrend | None = None
        self.outcome: RecoveryResult | None = None
        self.ended: tuple[Ended, ...] = ()
        self.unresolved: tuple[Ended, ...] = ()
        self._last = 0  # step of the last finding
        self._healthy = 0

    def resume(
        self,
        number: int,
        *,
        is_open: bool = False,
        onset: int = 0,
        step: int = 0,
        curve: LossTrend | None = None,
    ) -> None:
        """Continue after `number` incidents.

        Args:
            is_open: the last one is still open.
            onset: its first step.
            step: of its last finding.
            curve: its trend.
        """
        self.number, self.open, self.onset = number, is_open, onset
        self._last, self._healthy = step, 0
        self.curve = curve if is_open else None

    def note_anomaly(
        self, step: int, onset: int, *, curve: LossTrend | None = None
    ) -> tuple[int, str]:
        """Take in a rejecting finding; return (number, "open" if it is a new incident, else "").

        Args:
            curve: trend of the loss before the onset, for a new incident.
        """
        self._last, self._healthy = max(step, self._last), 0
        if self.open:
            self.onset = min(self.onset, onset)
            return self.number, ""
        self.number, self.open, self.onset = self.number + 1, True, onset
        self.curve, self.outcome = curve, None
        return self.number, OPEN

    def note_healthy(
        self, step: int, losses: Sequence[tuple[int, float]] = (), *, every_step: bool = False
    ) -> tuple[int | None, str]:
        """Take in a healthy applied step; return (number or None, how the incident ended or "").

        Steps that are run again after a rollback count from the step of the last finding on. If no
        incident is open, an unresolved one recovers when the loss is back.

        Args:
            losses: (step, loss) of accepted steps, this one included.
            every_step: each step from the last finding up to this one was applied, which a crash in
                between does not change; else the calls of this method are counted.
        """
        if not self.open:
            if not self._is_checked(step):
                return None, ""
            return self._recover_late(step, losses)
        if step >= self._last and every_step:
            self._healthy = step - self._last + 1
        elif step >= self._last:
            self._healthy += 1
        if self._healthy < self.confirm:
            return self.number, ""
        after = [pair for pair in losses if pair[0] >= self._last][-self.compared :]
        outcome = compare_with_trend(self.curve, after, until=self.onset + MOST)
        lasting = outcome is not None and outcome.lasting
        if lasting and self._healthy < PATIENCE * self.compared:
            return self.number, ""
        self.outcome = outcome
        state = HIGHER_LOSS if lasting else RECOVERED
        self.end(self.number, state, step=step, onset=self.onset, curve=self.curve)
        return self.number, state

    @property
    def compared(self) -> int:
        """Return how many of the newest losses are compared with the trend."""
        return max(self.confirm, LEAST)

    def _is_checked(self, step: int) -> bool:
        """Return whether unresolved incidents are checked at this step."""
        return step % self.compared == 0

    def _recover_late(
        self, step: int, losses: Sequence[tuple[int, float]]
    ) -> tuple[int | None, str]:
        for one in self.unresolved:
            is_back, outcome = self._is_back(one, losses)
            if is_back:
                self.outcome = outcome
                self.end(one.number, RECOVERED, step=step, onset=one.onset, curve=one.curve)
                return one.number, RECOVERED
        return None, ""

    def _is_back(
        self, one: Ended, losses: Sequence[tuple[int, float]]
    ) -> tuple[bool, RecoveryResult | None]:
        """Return whether the loss is on the trend from before an unresolved incident.

        The trend is extrapolated over as many steps as it is fitted over at most. After that its
        error would be so large that any loss would fit, so its last level counts.
        """
        newest = list(losses)[-self.compared :]
        if one.curve is not None and len(newest) < self.compared:
            return False, None
        outcome = compare_with_trend(one.curve, newest, until=one.onset + MOST)
        return outcome is None or not outcome.lasting, outcome

    def may_recover(self, step: int, losses: Sequence[tuple[int, float]]) -> bool:
        """Return whether any loss of the next step, `step`, would make an unresolved incident
        recover.
        """
        if self.open or not self.unresolved or not self._is_checked(step):
            return False
        low = min((loss for _, loss in losses), default=1.0)
        return any(self._is_back(one, [*losses, (step, low)])[0] for one in self.unresolved)

    # -- which states are part of an incident ------------------------------------------------------

    @property
    def since(self) -> int | None:
        """First step of the earliest incident that is open or unresolved; None if there is none."""
        onsets = [one.onset for one in self.unresolved]
        if self.open:
            onsets.append(self.onset)
        return min(onsets, default=None)

    def is_within(self, step: int, *, but_unresolved: bool = False) -> bool:
        """Return whether the state after `step` updates is part of an incident, over or not.

        Args:
            but_unresolved: do not count incidents that have ended with a loss above the trend.
        """
        since = self.since
        if but_unresolved:
            since = self.onset if self.open else None
        if since is not None and step >= since:
            return True
        for one in reversed(self.ended):
            if one.until is not None:
                if one.until <= step:  # this holds for all that ended before it too
                    return False
                if one.onset <= step:
                    return True
        return False

    def end(
        self, number: int, state: str, *, step: int, onset: int, curve: LossTrend | None
    ) -> None:
        """End an incident, or resolve an unresolved one, with step `step`."""
        if number == self.number:
            self.open = False
        until = None if state == HIGHER_LOSS else step
        ended = Ended(number, onset, until, curve, state == ACCEPTED)
        self._set([*(one for one in self.ended if one.number != number), ended])

    def accept(self, step: int) -> tuple[int, ...]:
        """Accept, for a user, the run as it is after `step` updates.

        Returns:
            The numbers of the incidents that were open or unresolved.
        """
        numbers = [one.number for one in self.unresolved]
        if self.open:
            numbers.append(self.number)
        for one in self.unresolved:
            self.end(one.number, ACCEPTED, step=step, onset=one.onset, curve=one.curve)
        if self.open:
            self.end(self.number, ACCEPTED, step=step, onset=self.onset, curve=self.curve)
        return tuple(numbers)

    def rewind(self, step: int, *, same_steps: bool = False) -> None:
        """Go back to the state after `step` updates; drop incidents that began later.

        If the state is part of an incident that is over, that incident is unresolved again.

        Args:
            same_steps: the next steps are made again as they were, as after a crash.
        """
        kept: list[Ended] = []
        for one in self.ended:
            if one.onset > step:
                continue
            if not same_steps and one.until is not None and one.until > step:
                one = one._replace(until=step if one.accepted else None)
            kept.append(one)
        self._set(kept)

    def _set(self, ended: list[Ended]) -> None:
        by_end = sorted(ended, key=lambda one: (one.until is None, one.until or 0, one.number))
        self.ended = tuple(by_end)
        self.unresolved = tuple(one for one in self.ended if one.until is None)
