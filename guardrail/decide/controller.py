"""observe(step) -> verdict: the state machine that every rank runs on the same reduced numbers.

Two kinds of memory, kept apart on purpose:

    state   detectors and the recent batches. Travels with each snapshot and rolls back with it (`state_dict`).
            Only applied steps change it, and overflows of the loss scale, which are counted: a rejected batch leaves
            no trace in it.
    facts   rollbacks done, incidents, causes, pardons (see guardrail.decide.memory). They outlive a rollback;
            the journal holds them, and `rebuild` reads them back after a crash.

Together: a controller that was loaded from a checkpoint and rebuilt from the journal reaches the
verdicts of one that never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from guardrail.core.events.decisions import CLOSED, REPEATED
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import (
    LOSS,
    LOSS_SCALE,
    Action,
    Cause,
    Diagnosis,
    Finding,
    FindingKind,
    LossTrend,
    Mode,
    Observation,
    Severity,
    Unresolved,
    Verdict,
)
from guardrail.decide import level_shift as levels
from guardrail.decide.advise_mode import AdviseSimulation
from guardrail.decide.detector_set import ActiveDetectors, DetectorSet
from guardrail.decide.diagnoses import leaving_nothing_out, signals_of
from guardrail.decide.memory import ControllerMemory
from guardrail.decide.policy import by_severity, is_anomaly, rejects, weights_are_clean
from guardrail.decide.recovery import LEAST, MOST, expected, fit_trend
from guardrail.decide.rejected_step import RejectedStep
from guardrail.decide.remedies.registry import BY_ACTION
from guardrail.decide.response import Response, respond
from guardrail.decide.rollback_window import Applied
from guardrail.detectors.base import Detector
from guardrail.detectors.build import find_detector
from guardrail.detectors.divergence import Divergence
from guardrail.detectors.growth import CLIMB
from guardrail.detectors.loss_scale import overflows
from guardrail.detectors.resume_jump import ROWS
from guardrail.detectors.spike import LOOK_BACK, ONSET_SHARE

# Verdicts of which no replay asks the cause.
UNASKED = (Action.APPLY, Action.FP16_OVERFLOW, Action.RETRY)
# Of the run itself: such trouble comes again. Hardware and the unknown say nothing of the next
# batch.
CAUSES = (Cause.DATA, Cause.STATE, Cause.DATA_AND_STATE)


class Controller(ControllerMemory):
    """Detectors, policy and memory of one run.

    Args:
        settings: the [guard] section.
        mode: overrides `settings.mode`.
    """

    def __init__(self, settings: GuardOptions, *, mode: Mode | None = None) -> None:
        super().__init__(settings)
        self.mode = settings.mode if mode is None else mode
        self.detector_set = DetectorSet(settings)
        # Reaches back to the earliest onset that a detector can name, and `window_before` batches
        # further.
        reach = (
            settings.skip_before
            + max(LOOK_BACK, Divergence.MEMORY * settings.detectors.divergence.steps, CLIMB)
            + 1
        )
        if any(BY_ACTION[entry.action].widens_window for entry in settings.escalation):
            reach += settings.max_window // 2
        self._history: deque[Applied] = deque(maxlen=reach)
        # (step, loss) of the last accepted steps
        self._losses: deque[tuple[int, float]] = deque(maxlen=2 * MOST)
        self._overflows = 0  # in a row, directly before the next step
        self._asks_again = False  # of the newest verdict: whether it is still the data
        self._advice = AdviseSimulation()
        self._resumed = 0  # rows that are still to be held against what was before a resume
        self._jumped: set[str] = set()  # signals of which a jump has been told
        # (step, loss) of the last steps that were applied and are not among `_losses`: a detector
        # objected, the mode was off, or the loss is signed.
        self._other_losses: deque[tuple[int, float]] = deque(maxlen=LEAST)

    # -- one step ----------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> Verdict:
        """Judge one step. In APPLY the step is taken as applied; anything else changes no state but
        for overflows.
        """
        if obs.overflow or overflows(obs):
            return self._overflowed(obs if obs.overflow else structs.replace(obs, overflow=True))
        if self.mode is Mode.OFF:
            self._overflows = 0
            self._history.append(Applied(obs.step, obs.first, obs.last))
            self._note_other_loss(obs)
            return Verdict(action=Action.APPLY, step=obs.step)
        findings: list[Finding] = []
        if self._history and obs.step < self._history[-1].step:
            findings += self.detector_set.restart.observe(obs)
            self._went_back(obs.step)
        if self.mode is Mode.ADVISE and self._advice.left_out:
            obs = structs.replace(obs, streak=len(self._advice.left_out))
        watch = self.detector_set.select(obs)
        if obs.tokens > 0:
            for observe in watch.observe:
                if found := observe(obs):
                    findings += found
            if self.incidents.open and not rejects(findings):
                findings += self._wary(obs)
            if self._resumed:
                findings += self._after_resume(obs)
        else:
            # Without a label token the loss is 0/0: every other claim about it would be noise.
            findings = self.detector_set.no_tokens.observe(obs)
        if not (findings or self.levels or self.borne):
            return self._healthy(obs, watch)
        evidence = self.detector_set.limit_named(by_severity(findings))
        # By position, whatever is found: who starts again may no longer be as wary as the process
        # that asked.
        if self.begins_level(obs, evidence):
            return self._level(
                obs, levels.begin_level(self.detector_set, obs, evidence), "another kind of data"
            )
        if self.is_borne(obs) and levels.is_only_raised(self.detector_set, obs):
            notes = levels.tolerate(self.detector_set, obs, evidence)
            return self._healthy(
                obs, watch, notes, f"borne: {_told(notes)}every batch is as high: applied"
            )
        if not evidence:
            return self._healthy(obs, watch)
        if evidence[0].severity is Severity.NOTE:
            return self._healthy(obs, watch, evidence, f"noted: {evidence[0].sentence()}")
        if self.pardoned(obs, evidence):
            return self._pardon(obs, evidence)
        return self._rejected(obs, evidence)

    def _wary(self, obs: Observation) -> list[Finding]:
        """While an incident of known cause is open, one step that both signals count to it is
        enough.

        Where the data is to blame, more of it is likely and a batch left out costs little: any step
        with which a row might begin. Where it is the state, the run would go back for it.
        """
        known = self.diagnoses.up_to(self.incidents.number, obs.first)
        together = self.detector_set.joint_cusum
        if known is None or known.cause not in CAUSES or known.shift or known.borne:
            return []
        counts = together.evidence(obs)
        wary = counts > 0.0 if known.cause.of_data else together.is_high(obs, ONSET_SHARE)
        return together.findings(obs, to_spare=counts, onset=obs.step) if wary else []

    def _healthy(
        self,
        obs: Observation,
        watch: ActiveDetectors,
        findings: tuple[Finding, ...] = (),
        reason: str = "",
    ) -> Verdict:
        advice = self._advice
        left_out = advice.left_out
        for update in watch.update:
            update(obs, left_out)
        self._history.append(Applied(obs.step, obs.first, obs.last))
        loss = obs.signals.get(LOSS)
        if loss is not None and math.isfinite(loss):
            (self._other_losses if self.detector_set.loss_is_signed else self._losses).append(
                (obs.step, loss)
            )
        self._overflows = 0
        if left_out or advice.streak:
            advice.accepted()
        if not findings and not self.incidents.open and not self.incidents.unresolved:
            return Verdict(action=Action.APPLY, step=obs.step)
        number, state = self.incidents.healthy(
            obs.step, self._losses, every_step=self.mode is not Mode.ADVISE
        )
        return Verdict(
            action=Action.APPLY,
            step=obs.step,
            findings=findings,
            reason=reason,
            incident=number,
            incident_state=state,
            outcome=self.incidents.outcome if state in CLOSED else None,
        )

    def _overflowed(self, obs: Observation) -> Verdict:
        """Too high a loss scale, until it has been lowered often enough: then it is not the scale.

        Such an update is left out in every mode; it is the loss scaler's arithmetic and no opinion
        of the guard.
        """
        self._overflows += 1
        if (
            self.mode is not Mode.OFF
            and (found := self.detector_set.loss_scale.judge_overflows(obs, self._overflows))
            is not None
        ):
            return self._rejected(obs, (found,))
        scale = obs.signals.get(LOSS_SCALE, 0.0)
        reason = f"the gradients overflow at a loss scale of {scale:g}"
        return Verdict(action=Action.FP16_OVERFLOW, step=obs.step, reason=reason, accepted=False)

    def _rejected(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        trouble = is_anomaly(findings)
        # What nobody has said the meaning of does not say how far to go back either.
        onset = max(1, min(f.onset for f in findings if find_detector(f.kind).dates_onset))
        streak = self._streak(obs)
        if streak and self.mode is Mode.ADVISE:
            onset = min(onset, self._advice.since)  # `auto` would still be at that step
        number, state = (
            self.incidents.trouble(
                obs.step, onset, curve=None if self.incidents.open else self._curve(onset)
            )
            if trouble
            else (None, "")
        )
        return self._answer(obs, findings, onset=onset, number=number, state=state)

    def _answer(
        self,
        obs: Observation,
        findings: tuple[Finding, ...],
        *,
        onset: int,
        number: int | None,
        state: str,
    ) -> Verdict:
        """What is done about a rejected step, by what is known of its incident."""
        case = RejectedStep(
            obs=obs,
            findings=findings,
            onset=onset,
            streak=self._streak(obs),
            rollbacks=[*self.rollbacks, *self._advice.rollbacks],
            diagnosis=self.diagnoses.now(number, self.rollbacks) if number is not None else None,
            history=self._history,
            overflows=self._overflows,
            settings=self.settings,
            advise=self.mode is Mode.ADVISE,
        )
        action, recent = case.choose_action(), case.recent_rollbacks
        self._asks_again = weights_are_clean(case.diagnosis) and (
            case.exceeds_data_skips
            or _is_due(case.streak + 1, self.settings.rollback_after_rejections)
        )
        # The same place again, before enough healthy steps have gone by since the run went back for
        # it.
        again = bool(recent) and case.applied - recent[-1].from_step < self.incidents.confirm
        if action in (Action.ROLLBACK, Action.HALT) and again:
            if levels.are_only_norms_high(self.detector_set, obs, findings):
                notes = levels.begin_norms(self.detector_set, obs, findings)
                return self._level(obs, notes, "again behind a rollback while the loss is as usual")
            state = state or REPEATED
        done = respond(case, action)
        taken, would = done.action, None
        if self.mode is Mode.ADVISE:
            taken, would = Action.FP16_OVERFLOW if obs.overflow else Action.APPLY, done.action
            self._advise(done, obs, findings, onset)
            self._note_other_loss(obs)
        elif (
            self.mode is Mode.ASK and done.action in (Action.ROLLBACK, Action.HALT)
        ) or done.escalation == "pause":
            taken, would = Action.PAUSE, done.action
        elif number is None:
            self.empty_spans.add((obs.first, obs.last))
        return Verdict(
            action=taken,
            step=obs.step,
            findings=findings,
            onset=onset,
            window=done.window,
            positions=done.positions if done.action is Action.ROLLBACK else (),
            before_step=done.before,
            reason=done.reason,
            would=would,
            accepted=False,
            incident=number,
            incident_state=state,
            escalation=done.escalation if number is not None else "",
            remedies=done.remedies,
            cause=case.cause,
        )

    def _curve(self, onset: int) -> LossTrend | None:
        if self.detector_set.loss_is_signed:
            return None  # such a loss shows no progress
        return fit_trend([pair for pair in self._losses if pair[0] < onset])

    # -- what cannot be rejected -------------------------------------------------------------------

    def safe_limits(self, like: Observation) -> dict[str, float] | None:
        """Signal -> a value up to which the next step is applied without a word, if all keep to it,
        the loss above 0.

        All detectors speak of what is high, whichever signal it is, so they are asked about the one
        step in which every signal is as high as it may be: what says nothing of that says nothing
        of any step below it. `Stuck` alone speaks of a number that is the same; while it would,
        there is no answer.

        Args:
            like: the next step, with the names of its signals; their values do not matter.

        Returns:
            None where it cannot be said: in other modes than `auto` and `ask`, while an incident is
            open or the step may bring the loss of an unresolved one back, right behind a resume,
            and wherever a detector has something to say of the step with the high values.
        """
        if (
            self.mode not in (Mode.AUTO, Mode.ASK)
            or self.incidents.open
            or self._resumed
            or not self._history
        ):
            return None
        if self.incidents.may_recover(like.step, self._losses):
            return None
        return self.detector_set.safe_limits(like)

    # -- a new level -------------------------------------------------------------------------------

    def _level(self, obs: Observation, notes: tuple[Finding, ...], why: str) -> Verdict:
        """Applied: where the signals stand is a level of its own, from which their baselines
        begin.
        """
        return self._healthy(
            obs, self.detector_set.select(obs), notes, f"level shift: {_told(notes)}{why}: accepted"
        )

    # -- the cause ---------------------------------------------------------------------------------

    def needs_cause_test(self, verdict: Verdict) -> bool:
        """Whether a replay should look for the cause of this verdict's incident, before the verdict
        takes effect.

        Once for each trouble of an incident (see guardrail.decide.diagnoses); again after one that
        has told nothing, or that the hardware does not repeat itself, and where update after update
        is left out because the data is to blame.
        """
        if (
            not self.settings.cause_test
            or self.mode not in (Mode.AUTO, Mode.ASK)
            or verdict.incident is None
        ):
            return False
        if verdict.action in UNASKED:
            return False
        if self.detector_set.loss_is_signed and {
            finding.signal for finding in verdict.findings
        } == {LOSS}:
            if all(finding.kind is FindingKind.LOSS_SPIKE for finding in verdict.findings):
                return False  # a replay compares ratios, which mean nothing here
        return self._asks_again or self.diagnoses.needs_diagnosis(verdict, self.rollbacks)

    def classify_shift(self, obs: Observation, diagnosis: Diagnosis) -> Diagnosis:
        """The diagnosis with the word whether this is another kind of data, to be learnt, or no
        more than raised.
        """
        if (
            diagnosis.cause is Cause.STATE
            and not diagnosis.applied
            and levels.is_only_raised(self.detector_set, obs)
        ):
            return structs.replace(
                diagnosis, borne=True, reason=f"{diagnosis.reason}: raised, and no spike: borne"
            )
        if self.settings.new_data != "accept" or not levels.is_new_data(
            self.detector_set, obs, diagnosis
        ):
            if diagnosis.ahead and diagnosis.structure is None:
                unknown = "the label order was not measured, so new data and noise look the same: treated as bad data"
                return structs.replace(diagnosis, reason=f"{diagnosis.reason}: {unknown}")
            return diagnosis
        return structs.replace(
            diagnosis, shift=True, reason=f"{diagnosis.reason}: another kind of data"
        )

    def apply_diagnosis(self, obs: Observation, verdict: Verdict, diagnosis: Diagnosis) -> Verdict:
        """The verdict in the light of what a replay has shown; `verdict` is what `observe` has said
        of `obs`.

        The data, alone or with this state: leave it out, however often in a row, as far as `skips`
        allows; go back only where an update of it is in the weights. The state: no batch is to
        blame, so go back and leave nothing out. The hardware: form the same batch again, and halt
        where that has happened too often.
        """
        assert verdict.incident is not None and verdict.onset is not None
        self.diagnoses.learn(
            verdict.incident,
            diagnosis,
            onset=verdict.onset,
            step=verdict.step,
            place=obs.first,
            signals=signals_of(verdict.findings),
            rollbacks=self.rollbacks,
        )
        if diagnosis.cause is Cause.HARDWARE:
            return self.diagnoses.unsound(
                verdict, diagnosis, settings=self.settings, mode=self.mode
            )
        self.note_cause(diagnosis, (obs.first, obs.last))
        if diagnosis.shift or diagnosis.borne:
            why = "of another kind of data: form the batch again, to learn it"
            if diagnosis.borne:
                why = "and so has every batch: form the batch again, to apply it"
            return leaving_nothing_out(verdict, Action.RETRY, why, cause=diagnosis.cause)
        return self._answer(
            obs,
            verdict.findings,
            onset=verdict.onset,
            number=verdict.incident,
            state=verdict.incident_state,
        )

    # -- pardons -----------------------------------------------------------------------------------

    def _pardon(self, obs: Observation, findings: tuple[Finding, ...]) -> Verdict:
        """Applied; a jump enters no baseline. What has stayed up is the new normal, or the next
        batch would say it.
        """
        lasting = any(finding.severity is Severity.WEIGHTS_DAMAGED for finding in findings)
        if lasting:
            self.overrule(obs)
        else:
            self._history.append(Applied(obs.step, obs.first, obs.last))
            self._overflows = 0
            self._note_other_loss(obs)
        return Verdict(
            action=Action.APPLY,
            step=obs.step,
            findings=tuple(
                structs.replace(finding, severity=Severity.NOTE) for finding in findings
            ),
            reason=f"pardoned: {findings[0].sentence()}",
            accepted=lasting,
        )

    def _after_resume(self, obs: Observation) -> list[Finding]:
        self._resumed -= 1
        found = self.detector_set.resume_jump.observe(obs)
        findings = [finding for finding in found if finding.signal not in self._jumped]
        self._jumped.update(f.signal for f in findings)
        return findings

    def resumed(self) -> None:
        """The process is a new one; call it when the state has been loaded. Jumps of the next rows
        will be noted.

        No part of the state: whether a run was resumed must not show in what it does.
        """
        self._resumed, self._jumped = ROWS, set()

    def overrule(self, obs: Observation) -> None:
        """A person had the update applied that the last verdict rejected.

        What it showed is taken as the new normal: detectors learn anew, so that they do not reject
        each step that follows. Call it instead of a second `observe`.
        """
        for detector in self.detectors.values():
            detector.reset()
            detector.update(obs)
        self._history.append(Applied(obs.step, obs.first, obs.last))
        self._overflows = 0
        self._note_other_loss(obs)

    def set_mode(self, mode: Mode) -> None:
        """Takes effect with the next step. Leaving `off`, detectors begin anew: what they knew is
        out of date.
        """
        if self.mode is Mode.OFF and mode is not Mode.OFF:
            self.detector_set.reset()
        if mode is not Mode.ADVISE:
            self._advice = AdviseSimulation()
        self.mode = mode

    # -- the window --------------------------------------------------------------------------------

    def _streak(self, obs: Observation) -> int:
        """Troubled batches rejected directly before this one; those that say nothing of the weights
        do not count.
        """
        if self.mode is Mode.ADVISE:
            return self._advice.streak
        end = self._history[-1].last if self._history else 0
        empty = sum(end <= first and last <= obs.first for first, last in self.empty_spans)
        return max(0, obs.streak - empty)

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The last batches whose updates were applied, oldest first."""
        return tuple(self._history)

    @property
    def detectors(self) -> dict[str, Detector]:
        """By name."""
        return self.detector_set.detectors

    # -- what is known -----------------------------------------------------------------------------

    def bands(self) -> dict[str, tuple[float, float]]:
        """signal -> (baseline, threshold) that the next step meets, in the signal's own units."""
        return self.detector_set.bands()

    @property
    def healthy_through(self) -> int:
        """The newest applied step that is surely healthy, 0 if there is none.

        No detector suspects it, and it lies before every incident that is not over.
        """
        since = self.incidents.since
        through = self.unsuspected_through
        return through if since is None else min(through, since - 1)

    @property
    def unsuspected_through(self) -> int:
        """The newest applied step that no detector suspects, 0 if there is none. Detectors learn
        what stays.
        """
        if not self._history:
            return 0
        last = self._history[-1].step
        if self.mode is Mode.OFF:
            return last
        suspected = self.detector_set.first_suspect_step()
        return last if suspected is None else suspected - 1

    def is_good(self, step: int) -> bool:
        """Whether the state after `step` updates is good: healthy steps have followed, and no
        incident holds it.
        """
        return (
            step + self.settings.steps_until_good <= self.healthy_through
            and not self.incidents.within(step)
        )

    def is_settled(self, step: int) -> bool:
        """Whether the state after `step` updates would be good, if the unresolved incidents were
        accepted.

        To go back for another incident, such a state will do: it is what the run was like before
        that one. Those from before the unresolved one may be thousands of steps old.
        """
        if (
            not self.incidents.unresolved
            or step + self.settings.steps_until_good > self.unsuspected_through
        ):
            return False
        return not self.incidents.within(step, but_unresolved=True)

    def unresolved(self) -> Unresolved | None:
        """The earliest incident that is not over, as the numbers show it. The journal says what was
        done about it.
        """
        incidents, since = self.incidents, self.incidents.since
        if since is None:
            return None
        one = next((one for one in incidents.unresolved if one.onset == since), None)
        number, curve = (
            (incidents.number, incidents.curve) if one is None else (one.number, one.curve)
        )
        applied = sorted(pair for pair in (*self._losses, *self._other_losses) if pair[0] >= since)
        losses = [loss for _, loss in applied[-LEAST:]]
        last = self._history[-1].step if self._history else since
        return Unresolved(
            incident=number,
            since=since,
            is_open=one is None,
            loss=statistics.median(losses) if losses else None,
            expected=None if curve is None else expected(curve, min(max(last, 1), since + MOST)),
        )

    def _note_other_loss(self, obs: Observation) -> None:
        loss = obs.signals.get(LOSS)
        if loss is not None and math.isfinite(loss):
            self._other_losses.append((obs.step, loss))

    # -- state: rolls back -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats are exact through `repr`. Independent of what is done with the
        controller afterwards.
        """
        return {
            "detectors": self.detector_set.state_dict(),
            "history": [list(structs.astuple(batch)) for batch in self._history],
            "losses": [list(pair) for pair in self._losses],
            "overflows": self._overflows,
            "advice": self._advice.state_dict(),
            # Only a recorded log can be resumed in the middle of what is one state.
            "resumed": [self._resumed, *sorted(self._jumped)]
            if self.mode is Mode.ADVISE and self._resumed
            else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go back to a state. Returns the detectors that it does not fit, as of another version:
        they begin anew.
        """
        anew = self.detector_set.load_state_dict(state["detectors"])
        self._history.clear()
        self._history.extend(Applied(*batch) for batch in state["history"])
        self._losses.clear()
        self._losses.extend((int(step), float(loss)) for step, loss in state.get("losses", ()))
        self._other_losses.clear()
        self._overflows = int(state.get("overflows", 0))
        advise = self.mode is Mode.ADVISE
        self._advice = AdviseSimulation.of(state["advice"]) if advise else AdviseSimulation()
        self._resumed, *jumped = (advise and state.get("resumed")) or (0,)
        self._jumped = set(jumped)
        return anew

    # -- advise ------------------------------------------------------------------------------------

    def _advise(
        self, done: Response, obs: Observation, findings: tuple[Finding, ...], onset: int
    ) -> None:
        """Book what `auto` would have done. Nothing was done, so the run goes on from the bad
        state.
        """
        advice = self._advice
        if advice.book(done, obs, findings, onset):
            if any(finding.severity is Severity.WEIGHTS_DAMAGED for finding in findings):
                self.detector_set.reset_weight_detectors()
        if len(advice.left_out) >= self.settings.detectors.spike.min_history:
            # So long a stretch is where the run is now. Learn that, instead of the same alarm for
            # ever.
            self.detector_set.reset()
            advice.left_out.clear()

    def _went_back(self, step: int) -> None:
        """The step counter of a recorded log went back; a live run restores a state and never sees
        this.

        By less than half it was resumed from a checkpoint, and its level should be what it was.
        Otherwise another run begins in the same log, of which nothing that was learnt says
        anything.
        """
        if 2 * step < self._history[-1].step:
            self.detector_set.reset()
            self._history.clear()
            self._losses.clear()
            self._overflows = 0
            self._advice = AdviseSimulation()
        while self._losses and self._losses[-1][0] >= step:
            self._losses.pop()
        while self._history and self._history[-1].step >= step:
            self._history.pop()
        if self._history:
            self.resumed()  # not far back, where the loss may have been another


def _told(findings: Sequence[Finding]) -> str:
    """The first of them as the beginning of a sentence; "" where nothing was found."""
    return f"{findings[0].sentence()}, " if findings else ""


def _is_due(rejections: int, persist: int) -> bool:
    """At `persist` in a row, at twice that, at four times that, ..."""
    times, rest = divmod(rejections, persist)
    return rest == 0 and times > 0 and times & (times - 1) == 0
