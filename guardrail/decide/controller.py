"""observe(step) -> verdict: the state machine that every rank runs on the same reduced numbers.

It has two kinds of memory:

state    Detectors and the recent batches. It travels with each snapshot and rolls back with it
         (`state_dict`). Only applied steps change it, and overflows of the loss scale, which are
         counted. A rejected batch leaves no trace in it.
memory   Rollbacks, incidents, causes, the allowlist (see guardrail.decide.memory). It outlives a
         rollback. The journal holds it, and `rebuild` reads it back after a crash.

So a controller can be loaded from a checkpoint and rebuilt from the journal. Its verdicts are then
those of a controller that never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import structs

from guardrail.core.events.event import Event
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, Observation, Severity
from guardrail.core.records.signals import LOSS_SCALE
from guardrail.core.records.status import Unresolved
from guardrail.core.records.verdicts import Action, Cause, Diagnosis, Mode, Verdict
from guardrail.decide import level_shift
from guardrail.decide.acceptance import Acceptance, first_sentence
from guardrail.decide.advise_mode import AdviseSimulation
from guardrail.decide.applied_steps import AppliedSteps
from guardrail.decide.controller_state import ControllerState
from guardrail.decide.detector_set import DetectorSet
from guardrail.decide.memory import ControllerMemory
from guardrail.decide.memory_rebuild import rebuild_memory
from guardrail.decide.policy import rejects, sort_by_severity
from guardrail.decide.rejection import Rejection
from guardrail.decide.resume_watch import ResumeWatch
from guardrail.decide.rollback_window import Applied
from guardrail.decide.state_health import StateHealth
from guardrail.detectors.base import Detector
from guardrail.detectors.loss_scale import overflows
from guardrail.detectors.spike import ONSET_SHARE

# Causes in the run itself, which make more of the same likely. A fault of the hardware, or an unknown
# cause, says nothing about the next batch.
RUN_CAUSES = (Cause.DATA, Cause.STATE, Cause.DATA_AND_STATE)


class Controller:
    """Detectors, policy and memory of one run.

    Args:
        settings: the [guard] section.
        mode: overrides `settings.mode`.
    """

    def __init__(self, settings: GuardOptions, *, mode: Mode | None = None) -> None:
        self._state = ControllerState(
            settings=settings,
            mode=settings.mode if mode is None else mode,
            detectors=DetectorSet(settings),
            steps=AppliedSteps(settings),
            memory=ControllerMemory(settings),
            advice=AdviseSimulation(),
        )
        self._acceptance = Acceptance(self._state)
        self._rejection = Rejection(self._state, self._acceptance)
        self._health = StateHealth(self._state)
        self._resume = ResumeWatch(self.detector_set.resume_jump)

    # -- one step ----------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> Verdict:
        """Judge one step.

        A step whose verdict is APPLY counts as applied. Any other verdict changes no state, except
        for the count of overflows.
        """
        state, memory = self._state, self._state.memory
        if obs.overflow or overflows(obs):
            return self._judge_overflow(structs.replace(obs, overflow=True))
        if state.mode is Mode.OFF:
            self._acceptance.accept_without_learning(obs)
            return Verdict(action=Action.APPLY, step=obs.step)
        findings: list[Finding] = []
        batches = state.steps.batches
        if batches and obs.step < batches[-1].step:
            findings += state.detectors.restart.observe(obs)
            self._follow_restart(obs.step)
        if state.mode is Mode.ADVISE and state.advice.skipped:
            obs = structs.replace(obs, streak=len(state.advice.skipped))
        active = state.detectors.select(obs)
        if obs.tokens > 0:
            for observe in active.observe:
                if found := observe(obs):
                    findings += found
            if memory.incidents.open and not rejects(findings):
                findings += self._judge_warily(obs)
            if self._resume.rows:
                findings += self._resume.observe(obs)
        else:
            # Without a label token the loss is 0/0: every other finding about it would be noise.
            findings = state.detectors.no_tokens.observe(obs)
        if not findings and not memory.levels and not memory.tolerated:
            return self._acceptance.accept(obs, active)
        evidence = state.detectors.limit_named(sort_by_severity(findings))
        return self._judge_findings(obs, evidence)

    def _judge_findings(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        """Return the verdict of a step with findings, or with a level that is to be accepted.

        Args:
            findings: most severe first; () is possible.
        """
        detectors, memory = self._state.detectors, self._state.memory
        active = detectors.select(obs)
        # Whether a level begins depends on the position alone, not on the findings: a process that
        # starts again may be less wary than the one that made the cause test.
        if memory.begins_level(obs, findings):
            notes = level_shift.begin_level(detectors, obs, findings)
            return self._acceptance.accept_level(obs, notes, "another kind of data")
        if memory.is_tolerated(obs) and level_shift.is_only_raised(detectors, obs):
            notes = level_shift.tolerate(detectors, obs, findings)
            reason = f"tolerated: {first_sentence(notes)}every batch is as high: applied"
            return self._acceptance.accept(obs, active, notes, reason)
        if not findings:
            return self._acceptance.accept(obs, active)
        if findings[0].severity is Severity.NOTE:
            reason = f"noted: {findings[0].sentence()}"
            return self._acceptance.accept(obs, active, findings, reason)
        if memory.is_allowlisted(obs, findings):
            return self._acceptance.accept_allowed(obs, findings)
        return self._rejection.reject(obs, findings)

    def _judge_warily(self, obs: Observation) -> list[Finding]:
        """Return findings of a step that loss and norm raise together, during an open incident.

        While the cause is known, one such step is enough. If the data is the cause, more bad data
        is likely and a skipped batch costs little. So each step counts that could begin a row. If
        the state is the cause, the run would be rolled back, so both must be higher.
        """
        memory = self._state.memory
        joint = self._state.detectors.joint_cusum
        known = memory.diagnoses.up_to(memory.incidents.number, obs.first)
        if known is None or known.cause not in RUN_CAUSES or known.shift or known.borne:
            return []
        evidence = joint.evidence(obs)
        if known.cause.of_data:
            is_suspect = evidence > 0.0
        else:
            is_suspect = joint.is_high(obs, ONSET_SHARE)
        if not is_suspect:
            return []
        return joint.findings(obs, to_spare=evidence, onset=obs.step)

    def _judge_overflow(self, obs: Observation) -> Verdict:
        """Return the verdict of an overflow.

        The loss scale is too high until it has been lowered often enough; then it is not the scale.
        Such an update is skipped in every mode: it is the arithmetic of the loss scaler.
        """
        state = self._state
        state.overflows += 1
        if state.mode is not Mode.OFF:
            finding = state.detectors.loss_scale.judge_overflows(obs, state.overflows)
            if finding is not None:
                return self._rejection.reject(obs, (finding,))
        scale = obs.signals.get(LOSS_SCALE, 0.0)
        reason = f"the gradients overflow at a loss scale of {scale:g}"
        return Verdict(action=Action.FP16_OVERFLOW, step=obs.step, reason=reason, accepted=False)

    def _follow_restart(self, step: int) -> None:
        """Follow a recorded log whose step counter went back. A live run never shows this.

        If it went back by less than half, the run was resumed from a checkpoint. Its level should
        be the same. Otherwise another run begins in the same log, and all state is reset.
        """
        state = self._state
        if 2 * step < state.steps.last_step:
            state.detectors.reset()
            state.steps.forget_all()
            state.overflows = 0
            state.advice = AdviseSimulation()
        state.steps.forget_from(step)
        if state.steps.batches:
            self.note_resume()  # it went not far back; far back, the loss may have been another

    # -- the cause ---------------------------------------------------------------------------------

    def needs_cause_test(self, verdict: Verdict) -> bool:
        """Return whether a cause test comes before the verdict takes effect."""
        return self._rejection.needs_cause_test(verdict)

    def classify_shift(self, obs: Observation, diagnosis: Diagnosis) -> Diagnosis:
        """Return the diagnosis, marked where the step is new data or only raised."""
        return self._rejection.classify_shift(obs, diagnosis)

    def apply_diagnosis(self, obs: Observation, verdict: Verdict, diagnosis: Diagnosis) -> Verdict:
        """Return the verdict with what a cause test has shown.

        Args:
            verdict: what `observe` has returned for `obs`.
        """
        return self._rejection.apply_diagnosis(obs, verdict, diagnosis)

    # -- from outside ------------------------------------------------------------------------------

    def note_resume(self) -> None:
        """Note jumps of the next rows: the process is new, and its state has been loaded.

        This is no part of the state: the decisions of a run must not depend on a resume.
        """
        self._resume.begin()

    def overrule(self, obs: Observation) -> None:
        """Apply the update that the last verdict rejected, as a user wants it.

        Call it instead of a second `observe`.
        """
        self._acceptance.overrule(obs)

    def set_mode(self, mode: Mode) -> None:
        """Change the mode from the next step on.

        After `off`, the detectors begin anew: their baselines are out of date.
        """
        state = self._state
        if state.mode is Mode.OFF and mode is not Mode.OFF:
            state.detectors.reset()
        if mode is not Mode.ADVISE:
            state.advice = AdviseSimulation()
        state.mode = mode

    def rebuild(self, events: Iterable[Event]) -> None:
        """Take the memory over from the journal. Replaces what was known."""
        self._state.memory = rebuild_memory(self.settings, events)

    # -- what is known -----------------------------------------------------------------------------

    @property
    def settings(self) -> GuardOptions:
        """Return the [guard] section."""
        return self._state.settings

    @property
    def mode(self) -> Mode:
        """Return the present mode."""
        return self._state.mode

    @property
    def memory(self) -> ControllerMemory:
        """Return what outlives a rollback."""
        return self._state.memory

    @property
    def detector_set(self) -> DetectorSet:
        """Return all detectors of the run."""
        return self._state.detectors

    @property
    def detectors(self) -> dict[str, Detector]:
        """Return name -> detector."""
        return self._state.detectors.detectors

    @property
    def applied(self) -> tuple[Applied, ...]:
        """Return the last batches whose updates were applied, oldest first."""
        return tuple(self._state.steps.batches)

    def bands(self) -> dict[str, tuple[float, float]]:
        """Return signal -> (baseline, limit) of the next step, in the units of the signal."""
        return self._state.detectors.bands()

    def safe_limits(self, like: Observation) -> dict[str, float] | None:
        """Return signal -> value up to which the next step is applied without a finding.

        The limits hold if all signals keep to them, with a loss above 0. Detectors report high
        values of any signal. So they judge one step with each signal at its limit. A detector
        without a finding there has none on any lower step. Only `Stuck` reports an equal number.
        While it would, there are no limits.

        Args:
            like: the next step, with the names of its signals; their values do not matter.

        Returns:
            None where it is not certain: in other modes than `auto` and `ask`, while an incident is
            open, and directly after a resume. Also if the step may bring the loss of an unresolved
            incident back, or a detector reports the step with the high values.
        """
        state = self._state
        if state.mode not in (Mode.AUTO, Mode.ASK) or not state.steps.batches:
            return None
        if state.memory.incidents.open or self._resume.rows:
            return None
        if state.memory.incidents.may_recover(like.step, state.steps.losses):
            return None
        return state.detectors.safe_limits(like)

    @property
    def healthy_through(self) -> int:
        """Return the newest applied step that is surely healthy; 0: there is none."""
        return self._health.healthy_through

    @property
    def unsuspected_through(self) -> int:
        """Return the newest applied step that no detector suspects; 0: there is none."""
        return self._health.unsuspected_through

    def is_good(self, step: int) -> bool:
        """Return whether the state after `step` updates is good."""
        return self._health.is_good(step)

    def is_settled(self, step: int) -> bool:
        """Return whether the state after `step` updates were good without unresolved incidents."""
        return self._health.is_settled(step)

    def unresolved(self) -> Unresolved | None:
        """Return the earliest incident that is not over; None: there is none."""
        return self._health.find_unresolved()

    # -- state: rolls back -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; floats are exact through `repr`.

        It is independent of what is done with the controller afterwards.
        """
        state = self._state
        # Only a recorded log can be resumed within one state.
        resumed = self._resume.state() if state.mode is Mode.ADVISE else []
        return {
            "detectors": state.detectors.state_dict(),
            **state.steps.state_dict(),
            "overflows": state.overflows,
            "advice": state.advice.state_dict(),
            "resumed": resumed,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Take over a state.

        Returns:
            The detectors that it does not fit, as of another version: they begin anew.
        """
        state = self._state
        anew = state.detectors.load_state_dict(saved["detectors"])
        state.steps.load_state_dict(saved)
        state.overflows = int(saved.get("overflows", 0))
        state.advice = AdviseSimulation()
        resumed = ()
        if state.mode is Mode.ADVISE:
            state.advice = AdviseSimulation.from_state(saved["advice"])
            resumed = saved.get("resumed") or ()
        self._resume.load_state(resumed)
        return anew
