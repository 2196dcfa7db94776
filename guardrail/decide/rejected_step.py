"""A rejected step, and what is known about it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, Observation, Severity
from guardrail.core.records.verdicts import Action, Cause, Diagnosis
from guardrail.decide.policy import decide_action, recent_rollbacks, weights_are_clean
from guardrail.decide.rollback import Rollback
from guardrail.decide.rollback_window import Applied


@dataclass(frozen=True, kw_only=True)
class RejectedStep:
    """A rejected step, and everything that the response depends on.

    Attributes:
        findings: most severe first.
        onset: first step of the anomaly.
        streak: batches with an anomaly that were rejected directly before this one.
        rollbacks: all of the run, oldest first.
        diagnosis: what a cause test has shown about the incident.
        history: the last applied batches, oldest first.
        overflows: consecutive overflows of the loss scale, up to this step.
        advise: nothing is done: the reason says what would be done.
    """

    obs: Observation
    findings: tuple[Finding, ...]
    onset: int
    streak: int
    rollbacks: Sequence[Rollback]
    diagnosis: Diagnosis | None
    history: Sequence[Applied]
    overflows: int
    settings: GuardOptions
    advise: bool = False

    @property
    def cause(self) -> Cause | None:
        return None if self.diagnosis is None else self.diagnosis.cause

    @property
    def exceeds_data_skips(self) -> bool:
        """Return whether bad data was skipped as often as `guard.max_data_skips` allows."""
        if any(finding.severity is Severity.WEIGHTS_DAMAGED for finding in self.findings):
            return False
        return weights_are_clean(self.diagnosis) and self.streak >= self.settings.max_data_skips

    @property
    def applied(self) -> int:
        """Return the updates applied so far."""
        return self.obs.step - 1

    @property
    def recent_rollbacks(self) -> list[Rollback]:
        """Return the rollbacks without enough healthy steps between them, up to now."""
        return recent_rollbacks(
            self.rollbacks, applied=self.applied, healthy_after=self.settings.reset_budget_after
        )

    def choose_action(self) -> Action:
        """Return what `auto` does, as long as there is a remedy for it."""
        return decide_action(
            self.findings,
            streak=self.streak,
            rollback_count=len(self.recent_rollbacks),
            settings=self.settings,
            diagnosis=self.diagnosis,
        )
