"""Numbers incidents, says when one is over and how it ended, and which states lie within one. Pure.

An incident is open from the first rejecting finding until `confirm` healthy steps have been applied
from its last one on. A loss that is still above what was expected then gets `PATIENCE` times as
long to come back. An incident outlives rollbacks, so it is no part of a snapshot; after a crash the
journal gives it back (`resume`).

    open        trouble, and what is done about it
    recurred    the same place has spiked again behind a rollback: the next rung of the ladder; it stays open
    recovered   the loss is where its curve before the onset leads, or nothing says otherwise
    offset      it has ended, but the loss has stayed above that curve: it is unresolved until the loss is back
                ("recovered") or a user accepts the loss ("accepted")

No state from the onset on becomes good before the incident has recovered or is accepted, whoever
had its updates applied. A state from within it never does: only states that are made later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from guardrail.core.events.decisions import ACCEPTED, HIGHER_LOSS, OPEN, RECOVERED
from guardrail.core.records import LossTrend, RecoveryResult
from guardrail.decide.recovery import LEAST, MOST, compare

PATIENCE = 4


class Ended(NamedTuple):
    """An incident that is no longer open.

    Attributes:
        onset: its first step; the states from there on hold what went wrong.
        until: the state after this step is the first that may become good. None: unresolved.
        curve: of the loss before the onset.
        accepted: by a user.
    """

    number: int
    onset: int
    until: int | None
    curve: LossTrend | None = None
    accepted: bool = False


class Incidents:
    """Args:
    confirm: healthy applied steps after the last finding that end an incident.
    """

    def __init__(self, *, confirm: int) -> None:
        self.confirm = max(1, confirm)
        self.number = 0  # of the last incident
        self.open = False
        self.onset = 0
        self.curve: LossTrend | None = None  # of the loss before the onset
        self.outcome: RecoveryResult | None = None  # of the last incident that was closed
        self.ended: tuple[Ended, ...] = ()  # by their end; those that are unresolved come last
        # Have ended with a loss above the curve, which is not back and which no one has accepted.
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
        """Go on after `number` incidents, the last one still open if `is_open`; `step` is that of
        its last finding.
        """
        self.number, self.open, self.onset, self._last, self._healthy = (
            number,
            is_open,
            onset,
            step,
            0,
        )
        self.curve = curve if is_open else None

    def trouble(self, step: int, onset: int, *, curve: LossTrend | None = None) -> tuple[int, str]:
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
        """A healthy applied step. Returns (number or None, how it ended if that was the last one
        needed else "").

        Steps that are run again after a rollback count from the place of the trouble on. Where no
        incident is open, an unresolved one recovers when the loss is back.

        Args:
            losses: (step, loss) of accepted steps, this one included.
            every_step: each step from the place of the trouble up to this one was applied, which a
                crash in between cannot change; else those are counted that have been told.
        """
        if not self.open:
            return self._recovered_late(step, losses) if self._is_checked(step) else (None, "")
        if step >= self._last:
            self._healthy = step - self._last + 1 if every_step else self._healthy + 1
        if self._healthy < self.confirm:
            return self.number, ""
        after = [pair for pair in losses if pair[0] >= self._last][-self.compared :]
        outcome = compare(self.curve, after, until=self.onset + MOST)
        lasting = outcome is not None and outcome.lasting
        if lasting and self._healthy < PATIENCE * self.compared:
            return self.number, ""
        self.outcome = outcome
        state = HIGHER_LOSS if lasting else RECOVERED
        self.end(self.number, state, step=step, onset=self.onset, curve=self.curve)
        return self.number, state

    @property
    def compared(self) -> int:
        """How many of the newest losses are held against the curve."""
        return max(self.confirm, LEAST)

    def _is_checked(self, step: int) -> bool:
        """Whether this step is one of those at which it is asked whether the loss is back."""
        return step % self.compared == 0

    def _recovered_late(
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
        """Whether the loss is where the curve before an unresolved incident leads.

        The curve is followed for as many steps as it was fitted over at most. Further on its own
        error would be so large that any loss would fit, and the level that it had reached counts.
        """
        newest = list(losses)[-self.compared :]
        if one.curve is not None and len(newest) < self.compared:
            return False, None
        outcome = compare(one.curve, newest, until=one.onset + MOST)
        return outcome is None or not outcome.lasting, outcome

    def may_recover(self, step: int, losses: Sequence[tuple[int, float]]) -> bool:
        """Whether the loss of the next step, `step`, could make an unresolved incident recover,
        however low it is.
        """
        if self.open or not self.unresolved or not self._is_checked(step):
            return False
        low = min((loss for _, loss in losses), default=1.0)
        return any(self._is_back(one, [*losses, (step, low)])[0] for one in self.unresolved)

    # -- which states lie within an incident -------------------------------------------------------

    @property
    def since(self) -> int | None:
        """The first step of the earliest incident that is not over, open or unresolved. None: there
        is none such.
        """
        onsets = [one.onset for one in self.unresolved] + [self.onset] * self.open
        return min(onsets, default=None)

    def within(self, step: int, *, but_unresolved: bool = False) -> bool:
        """Whether the state after `step` updates lies within an incident, be it over or not.

        Args:
            but_unresolved: those do not count that have ended with a loss above its curve.
        """
        since = (self.onset if self.open else None) if but_unresolved else self.since
        if since is not None and step >= since:
            return True
        for one in reversed(self.ended):
            if one.until is not None:
                if one.until <= step:  # and so are all that ended before it
                    return False
                if one.onset <= step:
                    return True
        return False

    def end(
        self, number: int, state: str, *, step: int, onset: int, curve: LossTrend | None
    ) -> None:
        """An incident has ended, or an unresolved one is resolved, with step `step`."""
        if number == self.number:
            self.open = False
        until = None if state == HIGHER_LOSS else step
        ended = Ended(number, onset, until, curve, state == ACCEPTED)
        self._set([*(one for one in self.ended if one.number != number), ended])

    def accept(self, step: int) -> tuple[int, ...]:
        """A user accepts the run as it is after `step` updates. Returns the numbers of what was not
        over.
        """
        numbers = [one.number for one in self.unresolved] + [self.number] * self.open
        for one in self.unresolved:
            self.end(one.number, ACCEPTED, step=step, onset=one.onset, curve=one.curve)
        if self.open:
            self.end(self.number, ACCEPTED, step=step, onset=self.onset, curve=self.curve)
        return tuple(numbers)

    def rewind(self, step: int, *, same_steps: bool = False) -> None:
        """The run has gone back to the state after `step` updates. What began later is no part of
        it.

        A state from within an incident that is over brings it back: it is unresolved again.

        Args:
            same_steps: the steps that follow are made once more as they were, as after a crash.
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
        self.ended = tuple(
            sorted(ended, key=lambda one: (one.until is None, one.until or 0, one.number))
        )
        self.unresolved = tuple(one for one in self.ended if one.until is None)
