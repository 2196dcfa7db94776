"""The causes of incidents that replays have found: facts of the journal that a rollback keeps.

Pure. A cause belongs to the anomaly for which it was found. One incident lasts until
there are enough healthy steps, so it may contain several anomalies. The cause is tested again in
three cases: another signal is anomalous, the anomaly began at another step, or a rollback for that
cause did not help.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import structs

from guardrail.core.events.decisions import Diagnosed
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, Severity
from guardrail.core.records.verdicts import Action, Cause, Diagnosis, Mode, Verdict
from guardrail.decide.policy import count_close_together
from guardrail.decide.rollback import Rollback


class DiagnosisKey(NamedTuple):
    """The anomaly for which a cause was found.

    Attributes:
        onset, step: the step at which it began, and at which it was rejected.
        signals: that were anomalous.
        answers: number of rollbacks of the incident up to then.
    """

    onset: int
    step: int
    signals: frozenset[str]
    answers: int


class Diagnoses:
    """The diagnoses of one run.

    Attributes:
        by_incident: incident -> its diagnosis, if there is one; of several, the last one.
    """

    def __init__(self) -> None:
        self.by_incident: dict[int, Diagnosis] = {}
        self._keys: dict[int, DiagnosisKey] = {}
        # incident -> (position of the batch, its cause)
        self._places: dict[int, list[tuple[int, Diagnosis]]] = {}
        # Steps at which a second pass gave other numbers.
        self._hardware_faults: list[int] = []

    def add(
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
        """Add a diagnosis.

        Args:
            onset, step: of the anomaly for which the replay was made: where it began, and was
                rejected.
            place: first position of the rejected batch.
            signals: anomalous there.
            rollbacks: of the run up to then.
        """
        self.by_incident[incident] = diagnosis
        self._places.setdefault(incident, []).append((place, diagnosis))
        answers = _count_rollbacks(rollbacks, incident)
        self._keys[incident] = DiagnosisKey(onset, step, frozenset(signals), answers)
        if diagnosis.cause is Cause.HARDWARE:
            self._hardware_faults.append(step)

    def current(self, incident: int, rollbacks: Sequence[Rollback]) -> Diagnosis | None:
        """Return the diagnosis of an incident; None if there is none.

        After a rollback since then, its bad update is no longer in the weights.
        """
        known = self.by_incident.get(incident)
        if known is None or not known.applied:
            return known
        if _count_rollbacks(rollbacks, incident) > self._keys[incident].answers:
            return structs.replace(known, applied=False, positions=())
        return known

    def up_to(self, incident: int, place: int) -> Diagnosis | None:
        """Return the last diagnosis for a batch that begins at this position or before.

        Positions are compared, not steps. A rollback, or a new start from an older state, repeats
        steps. Their batches were judged before the diagnosis.
        """
        for position, diagnosis in reversed(self._places.get(incident, [])):
            if position <= place:
                return diagnosis
        return None

    def needs_diagnosis(self, verdict: Verdict, rollbacks: Sequence[Rollback]) -> bool:
        """Return whether the cause of this anomaly is not known yet.

        A hardware fault is tested again each time: it says nothing about the next anomaly.
        """
        assert verdict.incident is not None
        known, key = self.by_incident.get(verdict.incident), self._keys.get(verdict.incident)
        if known is None or key is None or known.cause in (Cause.HARDWARE, Cause.UNKNOWN):
            return True
        if verdict.onset is not None and not key.onset <= verdict.onset <= key.step:
            return True
        if _count_rollbacks(rollbacks, verdict.incident) > key.answers:
            return True
        return not rejecting_signals(verdict.findings) <= key.signals

    def answer_hardware_fault(
        self, verdict: Verdict, diagnosis: Diagnosis, *, settings: GuardOptions, mode: Mode
    ) -> Verdict:
        """Return the verdict for a hardware fault: repeat the batch; halt after max_retries."""
        count = count_close_together(
            self._hardware_faults, at=verdict.step, healthy_after=settings.reset_budget_after
        )
        where = "the hardware"
        if diagnosis.rank >= 0:
            where = f"rank {diagnosis.rank} on {diagnosis.host}"
        if count <= settings.max_retries:
            return reject_without_skip(
                verdict,
                Action.RETRY,
                f"but {where} did not reproduce it; batch repeated "
                f"(retry {count} of {settings.max_retries})",
                cause=diagnosis.cause,
            )
        reason = (
            f"but {where} did not reproduce it {count} times without "
            f"{settings.reset_budget_after} healthy steps in between, and guard.max_retries = "
            f"{settings.max_retries}: halt"
        )
        if mode is Mode.ASK:
            return reject_without_skip(
                verdict, Action.PAUSE, reason, would=Action.HALT, cause=diagnosis.cause
            )
        return reject_without_skip(verdict, Action.HALT, reason, cause=diagnosis.cause)


def reject_without_skip(
    verdict: Verdict, action: Action, why: str, *, cause: Cause, would: Action | None = None
) -> Verdict:
    """Return a rejection whose batch is not the cause: no data is skipped, no state restored."""
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


def _count_rollbacks(rollbacks: Sequence[Rollback], incident: int) -> int:
    return sum(one.incident == incident for one in rollbacks)


def rejecting_signals(findings: Iterable[Finding]) -> frozenset[str]:
    """Return the signals for which an update is rejected."""
    return frozenset(
        finding.signal for finding in findings if finding.severity is not Severity.NOTE
    )


def read_diagnosis(event: Diagnosed) -> Diagnosis:
    """Return the diagnosis of a journal line; ValueError if its cause is unknown."""
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
