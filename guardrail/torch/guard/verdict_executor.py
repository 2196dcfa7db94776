"""Carry out what the controller has decided. The journal gets the reasons first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from guardrail.core.events.decisions import Diagnosed
from guardrail.core.events.run_state import Note
from guardrail.core.records.findings import Observation
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Diagnosis, Mode, Verdict
from guardrail.decide.diagnoses import rejecting_signals
from guardrail.decide.questions import ParkResult
from guardrail.decide.sample_cursor import Batch
from guardrail.torch.checkpoint.snapshot_manager import SnapshotManager
from guardrail.torch.diagnose.attribution import Attribution, Texts, describe_outliers
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.quarantine import Quarantine
from guardrail.torch.guard.side_effects import StepSideEffects
from guardrail.torch.guard.step import Step
from guardrail.torch.guard.step_diagnosis import StepDiagnosis
from guardrail.torch.guard.step_evidence import StepEvidence
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.guard.timeline_switch import TimelineSwitch
from guardrail.torch.guard.update_applier import UpdateApplier
from guardrail.torch.guard.verdict_journal import VerdictJournal
from guardrail.torch.measure.reduced_step import ReducedStep

APPLIED_UNJUDGED = "applied before it was judged"

# (rejected step, its verdict, its numbers) -> the cause of its incident; a collective that leaves
# the run unchanged.
FindCause = Callable[[Step, Verdict, ReducedStep], Diagnosis]


class Ask(Protocol):
    """Waits for a user's answer; see `CommandHandler.park`."""

    def __call__(
        self,
        question: str = "",
        *,
        verdict: Verdict | None = None,
        batch: Batch | None = None,
        command: tuple[int, float] = ...,
    ) -> ParkResult: ...


class EndRun(Protocol):
    """Ends the run; see `RunEnd.end`."""

    def __call__(self, phase: Phase, reason: str, *, onset: int | None = None) -> None: ...


class VerdictExecutor:
    """Carries out the verdict of a judged step; the same on every rank.

    Args:
        applier: applies or drops the update.
        quarantine: skips data.
        timeline_switch: rolls back.
        snapshots: those after the onset of an open incident are no longer good.
        metrics: of the present step.
        side_effects: of the present step.
        evidence: finds where bad numbers come from.
        diagnosis: finds causes; None: no batch can be replayed.
        ask: waits for a user's answer.
        end: ends the run.
        sample_texts: sample ids -> their texts as the model read them, to describe what is unusual
            about them; called on rank 0.

    Attributes:
        find_cause: of an incident; None: nothing finds it.
    """

    def __init__(
        self,
        ctx: RunContext,
        applier: UpdateApplier,
        quarantine: Quarantine,
        timeline_switch: TimelineSwitch,
        *,
        snapshots: SnapshotManager,
        metrics: StepMetrics,
        side_effects: StepSideEffects,
        evidence: StepEvidence,
        diagnosis: StepDiagnosis | None,
        ask: Ask,
        end: EndRun,
        sample_texts: Texts | None = None,
    ) -> None:
        self._ctx = ctx
        self._applier, self._quarantine = applier, quarantine
        self._timeline_switch = timeline_switch
        self._metrics, self._side_effects = metrics, side_effects
        self._evidence, self._diagnosis = evidence, diagnosis
        self._journal = VerdictJournal(ctx, snapshots)
        self._ask_user, self._end = ask, end
        self._sample_texts: Texts | None = None
        if ctx.ranks.rank == 0:
            self._sample_texts = sample_texts
        self.find_cause: FindCause | None = None
        if diagnosis is not None:
            self.find_cause = diagnosis.find_cause

    def carry_out(
        self, step: Step, verdict: Verdict, reduced: ReducedStep, observation: Observation
    ) -> Verdict:
        """Explain a verdict and carry it out.

        Returns:
            The verdict that was carried out, which a cause may have changed.
        """
        self._ctx.progress.incident = verdict.incident
        if verdict.action is not Action.APPLY:
            self._side_effects.undo()
        evidence = self._evidence.collect(step, verdict, reduced)
        verdict = self._with_cause(step, verdict, reduced, observation)
        bad_samples: Attribution | None = None
        if self._diagnosis is not None:
            bad_samples = self._diagnosis.find_bad_samples(step.batch, verdict)
        verdict = self._within_share(step, verdict, bad_samples)
        self._journal.record(step, verdict, evidence)
        match verdict.action:
            case Action.APPLY:
                self._applier.apply(step, reduced)
            case Action.SKIP:
                self._skip(step, verdict, bad_samples)
            case Action.FP16_OVERFLOW:
                self._lower_loss_scale(step, verdict)
            case Action.ROLLBACK:
                self._roll_back(step, verdict)
            case Action.PAUSE:
                answer = self._ask(step, verdict, reduced)
                if answer is ParkResult.GO_ON:
                    self._go_on(step, verdict, reduced, observation, bad_samples)
                else:
                    self._follow_answer(step, verdict, answer)
            case Action.RETRY:  # the cursor has not advanced: the same batch comes again
                self._applier.skip()
            case Action.HALT:
                self._applier.skip()
                self.halt(verdict)
        return verdict

    def record_applied(self, step: Step, verdict: Verdict) -> None:
        """Write what was found about a step that is applied already."""
        self._ctx.progress.incident = verdict.incident
        self._journal.record(step, verdict, {})

    def roll_back_late(self, step: Step, observation: Observation, verdict: Verdict) -> None:
        """Restore the state before an update that was applied although the controller rejects it.

        The limits that the device compared it with were too high.
        """
        self.record_applied(step, verdict)
        window = verdict.window or (observation.first, observation.last)
        onset = verdict.onset or observation.step
        reason = f"{APPLIED_UNJUDGED}: {verdict.reason}"
        switch = self._timeline_switch
        span = switch.span(window=window, onset=onset, reason=reason, verdict=verdict)
        over = self._quarantine.over_share(span)
        if over:
            self._end(Phase.HALTED, f"{reason}; but {over}", onset=onset)
        elif not switch.roll_back(window=window, onset=onset, reason=reason, verdict=verdict):
            self._end(Phase.HALTED, reason, onset=onset)

    def end_incomplete(self) -> None:
        """End the run: a rank was asked to stop and skipped a part of the batch."""
        self._side_effects.undo()
        self._applier.skip()
        self._end(Phase.STOPPED, "asked to stop; the unfinished batch is used again after a resume")

    def halt(self, verdict: Verdict) -> None:
        """End the run for the reason of a verdict."""
        self._end(Phase.HALTED, verdict.reason, onset=verdict.onset)

    # -- what is decided ---------------------------------------------------------------------------

    def _with_cause(
        self, step: Step, verdict: Verdict, reduced: ReducedStep, observation: Observation
    ) -> Verdict:
        """Find the cause of the incident, and return the verdict as the cause changes it.

        The cause is in the journal before anything takes effect.
        """
        controller = self._ctx.controller
        if self.find_cause is None or not controller.needs_cause_test(verdict):
            return verdict
        found = self.find_cause(step, verdict, reduced)
        diagnosis = controller.classify_shift(observation, found)
        self._ctx.recorder.write(
            Diagnosed(
                **(msgspec.structs.asdict(diagnosis) | {"cause": diagnosis.cause.value}),
                incident=verdict.incident,
                at_step=step.number,
                batch=(step.batch.first, step.batch.last),
                onset=verdict.onset,
                signals=tuple(sorted(rejecting_signals(verdict.findings))),
            )
        )
        step.verdict = controller.apply_diagnosis(observation, verdict, diagnosis)
        self._metrics.set_action(step.verdict.action)
        return step.verdict

    def _within_share(
        self, step: Step, verdict: Verdict, bad_samples: Attribution | None
    ) -> Verdict:
        """Return the verdict, or a question or halt where it would skip more than the guard may.

        It is a question where a user can answer: in mode `ask`, and while a screen is open.
        """
        ctx = self._ctx
        decided: Action | None = verdict.action
        if verdict.action is Action.PAUSE:
            decided = verdict.would
        if decided not in (Action.SKIP, Action.ROLLBACK):
            return verdict
        over = self._quarantine.over_share(self._span(step, verdict, decided, bad_samples))
        if not over:
            return verdict
        is_asked = ctx.progress.mode is Mode.ASK
        if not is_asked:
            is_asked = ctx.ranks.broadcast(ctx.run is not None and ctx.run.screens() > 0)
        action, would = Action.HALT, None
        if is_asked:
            action, would = Action.PAUSE, Action.HALT
        step.verdict = msgspec.structs.replace(
            verdict,
            action=action,
            would=would,
            beyond=decided,
            reason=f"{verdict.reason}; but {over}",
        )
        self._metrics.set_action(step.verdict.action)
        return step.verdict

    def _span(
        self,
        step: Step,
        verdict: Verdict,
        action: Action,
        bad_samples: Attribution | None,
        *,
        allowed: bool = False,
    ) -> Span:
        """Return what a skip or a rollback skips."""
        if action is Action.ROLLBACK:
            assert verdict.window is not None
            return self._timeline_switch.span(
                window=verdict.window,
                onset=verdict.onset or step.number,
                reason=verdict.reason,
                verdict=verdict,
                allowed=allowed,
            )
        positions: tuple[int, ...] = ()
        if bad_samples is not None:
            positions = bad_samples.positions
        return Span(
            first=step.batch.first,
            last=step.batch.last,
            origin="rejected",
            step=step.number,
            reason=verdict.reason,
            positions=positions,
            allowed=allowed,
        )

    # -- what is done ------------------------------------------------------------------------------

    def _skip(
        self,
        step: Step,
        verdict: Verdict,
        bad_samples: Attribution | None,
        *,
        allowed: bool = False,
    ) -> None:
        ctx = self._ctx
        self._applier.skip()
        span = self._span(step, verdict, Action.SKIP, bad_samples, allowed=allowed)
        if bad_samples is None:
            self._quarantine.skip(span, verdict.remedies)
        else:
            documents, texts = self._quarantine.describe_samples, self._sample_texts
            samples = ctx.ranks.run_together(
                lambda: describe_outliers(
                    bad_samples, ledger=ctx.order, texts=texts, documents=documents
                )
            )
            self._quarantine.skip(span, verdict.remedies, samples=samples)
        if not span.positions:
            ctx.order.advance(step.batch, applied=False)
        # Else the cursor stays, and the next batch is formed from there without those samples.

    def _lower_loss_scale(self, step: Step, verdict: Verdict) -> None:
        """Skip the update and lower the loss scale. The data is not the cause and stays allowed."""
        ctx, batch = self._ctx, step.batch
        self._applier.skip()
        scale = self._applier.lower_loss_scale()
        skipped = f"positions {batch.first} to {batch.last - 1} are skipped once"
        message = f"{verdict.reason}: {skipped}, and the loss scale is {scale:g} now"
        ctx.recorder.write(Note(message=message, overflow=True, data={"loss_scale": scale}))
        ctx.order.advance(batch, applied=False)

    def _roll_back(self, step: Step, verdict: Verdict, *, allowed: bool = False) -> None:
        assert verdict.window is not None
        self._applier.skip()
        done = self._timeline_switch.roll_back(
            window=verdict.window,
            onset=verdict.onset or step.number,
            reason=verdict.reason,
            verdict=verdict,
            allowed=allowed,
        )
        if not done:
            self.halt(verdict)

    def _ask(self, step: Step, verdict: Verdict, reduced: ReducedStep) -> ParkResult:
        """Pause with the gradients kept, until a user or the deadline decides."""
        would = verdict.would or Action.ROLLBACK
        asked = time.perf_counter()
        answer = self._ask_user(
            f"{verdict.reason}; proposed: {would.value}",
            verdict=verdict,
            batch=step.batch,
            command=(reduced.command_kind, reduced.command_value),
        )
        step.began += time.perf_counter() - asked  # the time of the user does not count
        return answer

    def _follow_answer(self, step: Step, verdict: Verdict, answer: ParkResult) -> None:
        """Do what was decided in place of the update."""
        if answer is not ParkResult.AS_PROPOSED:
            self._applier.skip()  # stopped, rolled back or skipped by command: it is done
        elif (verdict.would or Action.ROLLBACK) is Action.ROLLBACK:
            self._roll_back(step, verdict)
        else:
            self._applier.skip()
            self.halt(verdict)

    def _go_on(
        self,
        step: Step,
        verdict: Verdict,
        reduced: ReducedStep,
        observation: Observation,
        bad_samples: Attribution | None,
    ) -> None:
        """Continue as a user has answered: apply the update where it is finite, else skip it."""
        ctx, batch = self._ctx, step.batch
        if verdict.beyond is Action.ROLLBACK:
            self._roll_back(step, verdict, allowed=True)
        elif verdict.beyond is not None:
            self._skip(step, verdict, bad_samples, allowed=True)
        elif math.isfinite(reduced.loss) and math.isfinite(reduced.grad_norm):
            ctx.controller.overrule(observation)
            self._side_effects.redo()
            self._metrics.set_learning_rate(self._applier.learning_rate(step.number))
            self._applier.apply(step, reduced)
            self._metrics.set_action(Action.APPLY)
        elif ctx.order.why_user_may_not_skip(batch.first, batch.last):
            self.halt(verdict)
        else:
            self._skip(step, verdict, None, allowed=True)
