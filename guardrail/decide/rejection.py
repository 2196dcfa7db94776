"""Rejected steps: their incident, their cause, and what follows. Pure."""

from __future__ import annotations

from msgspec import structs

from guardrail.core.events.decisions import REPEATED
from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import Action, Cause, Diagnosis, LossTrend, Mode, Verdict
from guardrail.decide import level_shift
from guardrail.decide.acceptance import Acceptance
from guardrail.decide.controller_state import ControllerState
from guardrail.decide.diagnoses import reject_without_skip, rejecting_signals
from guardrail.decide.policy import is_anomaly, weights_are_clean
from guardrail.decide.rejected_step import RejectedStep
from guardrail.decide.response import Response, respond
from guardrail.detectors.build import find_detector

# Verdicts without a cause test.
WITHOUT_CAUSE_TEST = (Action.APPLY, Action.FP16_OVERFLOW, Action.RETRY)


class Rejection:
    """Makes the verdict of a rejected step, also after a cause test.

    Args:
        acceptance: applies a step that turns out to be a new level.
    """

    def __init__(self, state: ControllerState, acceptance: Acceptance) -> None:
        self._state = state
        self._acceptance = acceptance
        self._is_test_due = False  # the newest verdict is tested once more

    # -- a rejected step ---------------------------------------------------------------------------

    def reject(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        """Return the verdict of a rejected step.

        Args:
            findings: most severe first; the first one is no note.
        """
        state = self._state
        onset = _find_onset(findings)
        if self._streak(obs) and state.mode is Mode.ADVISE:
            onset = min(onset, state.advice.since)  # `auto` would still be at that step
        number, incident_state = None, ""
        if is_anomaly(findings):
            incidents = state.memory.incidents
            trend = None if incidents.open else self._loss_trend(onset)
            number, incident_state = incidents.note_anomaly(obs.step, onset, curve=trend)
        return self._respond(
            obs, findings, onset=onset, number=number, incident_state=incident_state
        )

    def _respond(
        self,
        obs: Observation,
        findings: tuple[Finding, ...],
        *,
        onset: int,
        number: int | None,
        incident_state: str,
    ) -> Verdict:
        """Return what is done about a rejected step, by what is known about its incident."""
        state = self._state
        case = self._case(obs, findings, onset=onset, number=number)
        action = case.choose_action()
        self._is_test_due = weights_are_clean(case.diagnosis) and (
            case.exceeds_data_skips
            or _is_due(case.streak + 1, state.settings.rollback_after_rejections)
        )
        if action in (Action.ROLLBACK, Action.HALT) and self._is_same_place(case):
            if level_shift.are_only_norms_high(state.detectors, obs, findings):
                notes = level_shift.begin_norms(state.detectors, obs, findings)
                why = "again after a rollback while the loss is normal"
                return self._acceptance.accept_level(obs, notes, why)
            incident_state = incident_state or REPEATED
        response = respond(case, action)
        taken, would = self._choose_taken(response, obs)
        if state.mode is Mode.ADVISE:
            self._simulate(response, obs, findings, onset)
            state.steps.add_other_loss(obs)
        elif number is None and taken is response.action:
            state.memory.empty_spans.add((obs.first, obs.last))
        return Verdict(
            action=taken,
            step=obs.step,
            findings=findings,
            onset=onset,
            window=response.window,
            positions=response.positions if response.action is Action.ROLLBACK else (),
            before_step=response.before,
            reason=response.reason,
            would=would,
            accepted=False,
            incident=number,
            incident_state=incident_state,
            escalation=response.escalation if number is not None else "",
            remedies=response.remedies,
            cause=case.cause,
        )

    def _case(
        self, obs: Observation, findings: tuple[Finding, ...], *, onset: int, number: int | None
    ) -> RejectedStep:
        state, memory = self._state, self._state.memory
        diagnosis = None
        if number is not None:
            diagnosis = memory.diagnoses.current(number, memory.rollbacks)
        return RejectedStep(
            obs=obs,
            findings=findings,
            onset=onset,
            streak=self._streak(obs),
            rollbacks=[*memory.rollbacks, *state.advice.rollbacks],
            diagnosis=diagnosis,
            history=state.steps.batches,
            overflows=state.overflows,
            settings=state.settings,
            advise=state.mode is Mode.ADVISE,
        )

    def _is_same_place(self, case: RejectedStep) -> bool:
        """Return whether too few healthy steps have followed the last rollback."""
        recent = case.recent_rollbacks
        if not recent:
            return False
        return case.applied - recent[-1].from_step < self._state.memory.incidents.confirm

    def _choose_taken(self, response: Response, obs: Observation) -> tuple[Action, Action | None]:
        """Return (what is done now, what `auto` would do instead; None: the same)."""
        action, mode = response.action, self._state.mode
        if mode is Mode.ADVISE:
            return (Action.FP16_OVERFLOW if obs.overflow else Action.APPLY), action
        asks = mode is Mode.ASK and action in (Action.ROLLBACK, Action.HALT)
        if asks or response.escalation == "pause":
            return Action.PAUSE, action
        return action, None

    def _streak(self, obs: Observation) -> int:
        """Return how many batches with an anomaly were rejected directly before this one.

        Batches without labels say nothing about the weights and do not count.
        """
        state = self._state
        if state.mode is Mode.ADVISE:
            return state.advice.streak
        end = state.steps.end
        empty = [
            span for span in state.memory.empty_spans if end <= span[0] and span[1] <= obs.first
        ]
        return max(0, obs.streak - len(empty))

    def _loss_trend(self, onset: int) -> LossTrend | None:
        if self._state.detectors.loss_is_signed:
            return None  # such a loss shows no progress
        return self._state.steps.fit_trend_before(onset)

    # -- advise ------------------------------------------------------------------------------------

    def _simulate(
        self, response: Response, obs: Observation, findings: tuple[Finding, ...], onset: int
    ) -> None:
        """Note what `auto` would have done. It was not done: the run continues with the bad state."""
        state, advice = self._state, self._state.advice
        goes_back = advice.note_response(response, obs, findings, onset)
        if goes_back and any(one.severity is Severity.WEIGHTS_DAMAGED for one in findings):
            state.detectors.reset_weight_detectors()
        if len(advice.skipped) >= state.settings.detectors.spike.min_history:
            # The run has been there for so long. Learn that, instead of the same alarm forever.
            state.detectors.reset()
            advice.skipped.clear()

    # -- the cause ---------------------------------------------------------------------------------

    def needs_cause_test(self, verdict: Verdict) -> bool:
        """Return whether a cause test comes before the verdict takes effect.

        It is made once for each anomaly of an incident (see guardrail.decide.diagnoses). It is
        repeated after a test without a result, and after one that was not reproducible. It is also
        repeated while many consecutive updates are skipped because of bad data.
        """
        state = self._state
        if not state.settings.cause_test or state.mode not in (Mode.AUTO, Mode.ASK):
            return False
        if verdict.incident is None or verdict.action in WITHOUT_CAUSE_TEST:
            return False
        if state.detectors.loss_is_signed and _is_loss_spike(verdict.findings):
            return False  # the test compares ratios, which mean nothing here
        if self._is_test_due:
            return True
        memory = state.memory
        return memory.diagnoses.needs_diagnosis(verdict, memory.rollbacks)

    def classify_shift(self, obs: Observation, diagnosis: Diagnosis) -> Diagnosis:
        """Return the diagnosis, marked where the step is new data or only raised."""
        state = self._state
        if diagnosis.cause is Cause.STATE and not diagnosis.applied:
            if level_shift.is_only_raised(state.detectors, obs):
                reason = f"{diagnosis.reason}: raised, and no spike: tolerated"
                return structs.replace(diagnosis, borne=True, reason=reason)
        accepts_new_data = state.settings.new_data == "accept"
        if accepts_new_data and level_shift.is_new_data(state.detectors, obs, diagnosis):
            reason = f"{diagnosis.reason}: another kind of data"
            return structs.replace(diagnosis, shift=True, reason=reason)
        if diagnosis.ahead and diagnosis.structure is None:
            unknown = (
                "the label order was not measured, so new data and noise look the same: "
                "treated as bad data"
            )
            return structs.replace(diagnosis, reason=f"{diagnosis.reason}: {unknown}")
        return diagnosis

    def apply_diagnosis(self, obs: Observation, verdict: Verdict, diagnosis: Diagnosis) -> Verdict:
        """Return the verdict with what a cause test has shown.

        Bad data, alone or with this state: skip it, as far as `max_data_skips` allows. Roll back
        only where one of its updates is in the weights. The state: roll back, and skip no data. Not
        reproducible: repeat the batch, and halt where that has happened too often.

        Args:
            verdict: what `observe` has returned for `obs`.
        """
        assert verdict.incident is not None and verdict.onset is not None
        memory = self._state.memory
        memory.diagnoses.add(
            verdict.incident,
            diagnosis,
            onset=verdict.onset,
            step=verdict.step,
            place=obs.first,
            signals=rejecting_signals(verdict.findings),
            rollbacks=memory.rollbacks,
        )
        if diagnosis.cause is Cause.HARDWARE:
            return memory.diagnoses.answer_hardware_fault(
                verdict, diagnosis, settings=self._state.settings, mode=self._state.mode
            )
        memory.note_cause(diagnosis, (obs.first, obs.last))
        if diagnosis.shift or diagnosis.borne:
            why = "of another kind of data: repeat the batch, to learn it"
            if diagnosis.borne:
                why = "as with every batch: repeat the batch, to apply it"
            return reject_without_skip(verdict, Action.RETRY, why, cause=diagnosis.cause)
        return self._respond(
            obs,
            verdict.findings,
            onset=verdict.onset,
            number=verdict.incident,
            incident_state=verdict.incident_state,
        )


def _find_onset(findings: tuple[Finding, ...]) -> int:
    """Return the first step of the anomaly, of the findings that know it."""
    onsets = [one.onset for one in findings if find_detector(one.kind).dates_onset]
    return max(1, min(onsets))


def _is_loss_spike(findings: tuple[Finding, ...]) -> bool:
    """Return whether all findings are spikes of the loss."""
    if {finding.signal for finding in findings} != {LOSS}:
        return False
    return all(finding.kind is FindingKind.LOSS_SPIKE for finding in findings)


def _is_due(rejections: int, first: int) -> bool:
    """Return whether a count is `first`, twice that, four times that, and so on."""
    times, rest = divmod(rejections, first)
    return rest == 0 and times > 0 and times & (times - 1) == 0
