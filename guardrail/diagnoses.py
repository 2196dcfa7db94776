"""What replays have told about the causes of incidents: facts that outlive a rollback, in the journal. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from guardrail.config import GuardSection
from guardrail.policy import Rollback, close_together
from guardrail.records import Action, Cause, Diagnosis, Mode, Verdict


class Diagnoses:
    """Attributes:
    of: incident -> its cause, as far as a replay has told it.
    """

    def __init__(self) -> None:
        self.of: dict[int, Diagnosis] = {}
        self._tried: dict[int, int] = {}  # incident -> rollbacks that had answered it when its cause was told
        self._unsound: list[int] = []  # steps at which the hardware gave other numbers the second time

    def learn(self, incident: int, diagnosis: Diagnosis, step: int, rollbacks: Sequence[Rollback]) -> None:
        """Args:
        step: at which the replay was made.
        rollbacks: of the run up to then.
        """
        self.of[incident] = diagnosis
        self._tried[incident] = _answers(rollbacks, incident)
        if diagnosis.cause is Cause.HARDWARE:
            self._unsound.append(step)

    def now(self, incident: int, rollbacks: Sequence[Rollback]) -> Diagnosis | None:
        """What is known of an incident; an update that a rollback has taken out since is in the weights no more."""
        known = self.of.get(incident)
        if known is not None and known.applied and _answers(rollbacks, incident) > self._tried[incident]:
            return structs.replace(known, applied=False)
        return known

    def untold(self, incident: int) -> bool:
        """Whether a replay has told nothing of it, or that the hardware does not repeat itself."""
        known = self.of.get(incident)
        return known is None or known.cause in (Cause.HARDWARE, Cause.UNKNOWN)

    def unsound(self, verdict: Verdict, diagnosis: Diagnosis, *, settings: GuardSection, mode: Mode) -> Verdict:
        """The verdict where the hardware is to blame: form the same batch again, and halt where that is too often."""
        count = close_together(self._unsound, at=verdict.step, healthy_after=settings.healthy_after)
        who = f"rank {diagnosis.rank} on {diagnosis.host}" if diagnosis.rank >= 0 else "the hardware"
        if count <= settings.retries:
            action = Action.RETRY
            reason = f"{who} does not repeat itself: form the batch again, time {count} of {settings.retries}"
        else:
            action = Action.HALT
            reason = (
                f"{who} has not repeated itself {count} times without {settings.healthy_after} healthy steps between "
                f"them: halt, since guard.retries allows {settings.retries}"
            )
        asked = mode is Mode.ASK and action is Action.HALT
        return structs.replace(
            verdict,
            action=Action.PAUSE if asked else action,
            would=action if asked else None,
            window=None,
            before_step=None,
            reason=f"{verdict.findings[0].sentence()}, but {reason}",
            cause=diagnosis.cause,
        )


def _answers(rollbacks: Sequence[Rollback], incident: int) -> int:
    return sum(one.incident == incident for one in rollbacks)


def diagnosis_of(data: Mapping[str, Any]) -> Diagnosis:
    """From the data of a `cause` event."""
    return Diagnosis(
        cause=Cause(data["cause"]),
        reason=str(data.get("reason", "")),
        rank=int(data.get("rank", -1)),
        host=str(data.get("host", "")),
        passes=int(data.get("passes", 0)),
        applied=bool(data.get("applied", False)),
    )
