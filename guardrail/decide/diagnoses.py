"""What replays have told about the causes of incidents: facts that outlive a rollback, in the
journal. Pure.

A cause belongs to the trouble for which it was told. An incident holds together what happens
without enough healthy steps in between, and that may be several kinds of trouble: the cause is
asked for again where another signal is in it, where it began at another place, or where going back
for that cause was in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import structs

from guardrail.core.events.decisions import Diagnosed
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import Action, Cause, Diagnosis, Finding, Mode, Severity, Verdict
from guardrail.decide.policy import count_close_together
from guardrail.decide.rollback import Rollback


class DiagnosisKey(NamedTuple):
    """For which trouble a cause was told.

    Attributes:
        onset, step: it began there, and was rejected there.
        signals: that were in it.
        answers: rollbacks that had answered the incident up to then.
    """

    onset: int
    step: int
    signals: frozenset[str]
    answers: int


class Diagnoses:
    """Attributes:
    of: incident -> its cause, as far as a replay has told it; of several, the last one.
    """

    def __init__(self) -> None:
        self.of: dict[int, Diagnosis] = {}
        self._told: dict[int, DiagnosisKey] = {}
        # incident -> (position of the batch, its cause)
        self._places: dict[int, list[tuple[int, Diagnosis]]] = {}
        # steps at which the hardware gave other numbers the second time
        self._unsound: list[int] = []

    def learn(
        self,
        incident: int,
        diagnosis: Diagnosis,
        *,
        onset: int,
        step: int,
        place: int,
        signals: Iterable[str],
        rollbacks: Sequence[Rollback],
    ) -> None:
        """Args:
        onset, step: of the trouble for which the replay was made: where it began, and was rejected.
        place: first position of the rejected batch.
        signals: in trouble there.
        rollbacks: of the run up to then.
        """
        self.of[incident] = diagnosis
        self._places.setdefault(incident, []).append((place, diagnosis))
        self._told[incident] = DiagnosisKey(
            onset, step, frozenset(signals), _answers(rollbacks, incident)
        )
        if diagnosis.cause is Cause.HARDWARE:
            self._unsound.append(step)

    def now(self, incident: int, rollbacks: Sequence[Rollback]) -> Diagnosis | None:
        """What is known of an incident; an update that a rollback has taken out since is in the
        weights no more.
        """
        known = self.of.get(incident)
        if (
            known is not None
            and known.applied
            and _answers(rollbacks, incident) > self._told[incident].answers
        ):
            return structs.replace(known, applied=False, positions=())
        return known

    def up_to(self, incident: int, place: int) -> Diagnosis | None:
        """The last cause told for a batch that lies not behind this position.

        Positions say where a run stands, and steps do not: after a rollback, or in a process that
        starts again from an older state, steps come by once more whose batches were judged before
        anybody knew.
        """
        found = [diagnosis for at, diagnosis in self._places.get(incident, ()) if at <= place]
        return found[-1] if found else None

    def needs_diagnosis(self, verdict: Verdict, rollbacks: Sequence[Rollback]) -> bool:
        """Whether no replay has told the cause of this trouble: none of its incident, or of another
        trouble.

        That the hardware does not repeat itself says nothing of the next time.
        """
        assert verdict.incident is not None
        known, told = self.of.get(verdict.incident), self._told.get(verdict.incident)
        if known is None or told is None or known.cause in (Cause.HARDWARE, Cause.UNKNOWN):
            return True
        elsewhere = verdict.onset is not None and not told.onset <= verdict.onset <= told.step
        in_vain = _answers(rollbacks, verdict.incident) > told.answers
        return elsewhere or in_vain or not signals_of(verdict.findings) <= told.signals

    def unsound(
        self, verdict: Verdict, diagnosis: Diagnosis, *, settings: GuardOptions, mode: Mode
    ) -> Verdict:
        """The verdict where the hardware is to blame: form the same batch again, and halt where
        that is too often.
        """
        count = count_close_together(
            self._unsound, at=verdict.step, healthy_after=settings.reset_budget_after
        )
        who = (
            f"rank {diagnosis.rank} on {diagnosis.host}" if diagnosis.rank >= 0 else "the hardware"
        )
        if count <= settings.max_retries:
            action = Action.RETRY
            reason = f"{who} does not repeat itself: form the batch again, time {count} of {settings.max_retries}"
        else:
            action = Action.HALT
            reason = (
                f"{who} has not repeated itself {count} times without "
                f"{settings.reset_budget_after} healthy steps between them: halt, "
                f"since guard.max_retries allows {settings.max_retries}"
            )
        asked = mode is Mode.ASK and action is Action.HALT
        return leaving_nothing_out(
            verdict,
            Action.PAUSE if asked else action,
            f"but {reason}",
            would=action if asked else None,
            cause=diagnosis.cause,
        )


def leaving_nothing_out(
    verdict: Verdict, action: Action, why: str, *, cause: Cause, would: Action | None = None
) -> Verdict:
    """A rejection whose batch is not to blame, so that neither it nor a window is left out and
    nothing goes back.
    """
    return structs.replace(
        verdict,
        action=action,
        would=would,
        window=None,
        positions=(),
        before_step=None,
        reason=f"{verdict.findings[0].sentence()}, {why}",
        cause=cause,
    )


def _answers(rollbacks: Sequence[Rollback], incident: int) -> int:
    return sum(one.incident == incident for one in rollbacks)


def signals_of(findings: Iterable[Finding]) -> frozenset[str]:
    """The signals for which an update is rejected."""
    return frozenset(
        finding.signal for finding in findings if finding.severity is not Severity.NOTE
    )


def diagnosis_of(event: Diagnosed) -> Diagnosis:
    """Return the diagnosis of a journal line. Raises ValueError where its cause is unknown."""
    event.check_readable("positions")
    return Diagnosis(
        cause=Cause(event.cause),
        reason=event.reason,
        rank=event.rank,
        host=event.host,
        passes=event.passes,
        applied=event.applied,
        positions=event.positions,
        ahead=event.ahead,
        structure=event.structure,
        shift=event.shift,
        borne=event.borne,
        evidence=event.evidence,
    )
