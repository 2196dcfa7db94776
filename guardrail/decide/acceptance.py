"""Steps whose updates are applied: the detectors learn them. Pure."""

from __future__ import annotations

from msgspec import structs

from guardrail.core.events.decisions import CLOSED
from guardrail.core.records.findings import Finding, Observation, Severity
from guardrail.core.records.verdicts import Action, Mode, Verdict
from guardrail.decide.controller_state import ControllerState
from guardrail.decide.detector_set import ActiveDetectors

ON_ALLOWLIST = "on the allowlist"


class Acceptance:
    """Makes the verdict of a step that is applied, and learns from the step."""

    def __init__(self, state: ControllerState) -> None:
        self._state = state

    def accept(
        self,
        obs: Observation,
        active: ActiveDetectors,
        findings: tuple[Finding, ...] = (),
        reason: str = "",
    ) -> Verdict:
        """Apply a step as healthy: it enters the baselines and counts towards recovery."""
        state = self._state
        advice, incidents = state.advice, state.memory.incidents
        skipped = advice.skipped
        for update in active.update:
            update(obs, skipped)
        state.steps.add(obs, is_accepted=not state.detectors.loss_is_signed)
        state.overflows = 0
        if skipped or advice.streak:
            advice.note_accepted()
        if not findings and not incidents.open and not incidents.unresolved:
            return Verdict(action=Action.APPLY, step=obs.step)
        number, incident_state = incidents.note_healthy(
            obs.step, state.steps.losses, every_step=state.mode is not Mode.ADVISE
        )
        return Verdict(
            action=Action.APPLY,
            step=obs.step,
            findings=findings,
            reason=reason,
            incident=number,
            incident_state=incident_state,
            outcome=incidents.outcome if incident_state in CLOSED else None,
        )

    def accept_level(self, obs: Observation, notes: tuple[Finding, ...], why: str) -> Verdict:
        """Apply a step from which on the baselines have a new level."""
        active = self._state.detectors.select(obs)
        reason = f"level shift: {first_sentence(notes)}{why}: accepted"
        return self.accept(obs, active, notes, reason)

    def accept_without_learning(self, obs: Observation) -> None:
        """Note a step that was applied and enters no baseline."""
        state = self._state
        state.steps.add(obs, is_accepted=False)
        state.overflows = 0

    def accept_allowed(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        """Apply a step of the allowlist.

        A jump enters no baseline. A level that has stayed up is the new normal; else the next batch
        would be rejected for it.
        """
        is_lasting = any(one.severity is Severity.WEIGHTS_DAMAGED for one in findings)
        if is_lasting:
            self.overrule(obs)
        else:
            self.accept_without_learning(obs)
        notes = tuple(structs.replace(one, severity=Severity.NOTE) for one in findings)
        return Verdict(
            action=Action.APPLY,
            step=obs.step,
            findings=notes,
            reason=f"{ON_ALLOWLIST}: {findings[0].sentence()}",
            accepted=is_lasting,
        )

    def overrule(self, obs: Observation) -> None:
        """Apply a step that was rejected, as a user wants it.

        Its values are the new normal: all detectors begin anew with it, so that they do not reject
        each step that follows.
        """
        for detector in self._state.detectors.detectors.values():
            detector.reset()
            detector.update(obs)
        self.accept_without_learning(obs)


def first_sentence(findings: tuple[Finding, ...]) -> str:
    """Return the first finding as the beginning of a sentence; "" where there is none."""
    return f"{findings[0].sentence()}, " if findings else ""
