"""Carrying out what the controller has decided, with the reasons on the record first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from guardrail.core.records import (
    LOSS,
    MAX_NAMED,
    Action,
    Diagnosis,
    FindingKind,
    Mode,
    Observation,
    Phase,
    Span,
    Verdict,
)
from guardrail.decide.advised_incidents import advised_words
from guardrail.decide.diagnoses import signals_of
from guardrail.decide.sample_order import Batch
from guardrail.torch.diagnose.attribution import Attribution, Texts, attribute, told
from guardrail.torch.diagnose.cause_test import FAR, CauseTest
from guardrail.torch.diagnose.embedding_tokens import DescribeTokens, token_evidence
from guardrail.torch.diagnose.nonfinite_module import first_nonfinite
from guardrail.torch.guard.command_handler import ParkResult
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduction import ReducedStep
from guardrail.torch.state.forward_side_effects import ForwardSideEffects

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

# (rejected try, its verdict, its numbers) -> the cause of its incident; a collective that leaves
# the run as it was.
Judge = Callable[[Step, Verdict, ReducedStep], Diagnosis]


class VerdictExecutor:
    """What one guard does with a judged step; the same on every rank.

    Args:
        texts: sample ids -> their texts as the model met them, for what is odd about them. Called
        on rank 0.
        tokens: see `DescribeTokens`. Called on rank 0.
        rerun: runs the forward passes of this rank's share of the last batch again, with the same
        dice.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        texts: Texts | None,
        tokens: DescribeTokens | None,
        rerun: Callable[[], None] | None,
    ) -> None:
        self._guard = guard
        self._texts, self._tokens = (texts, tokens) if guard.rank == 0 else (None, None)
        self._rerun = rerun
        self.judge: Judge | None = self._find_cause if guard.replays is not None else None

    def carry_out(
        self, step: Step, verdict: Verdict, reduced: ReducedStep, observation: Observation
    ) -> Verdict:
        """Explain and carry out; returns the verdict that was carried out, which a cause may have
        changed.
        """
        guard = self._guard
        guard.incident = verdict.incident
        if verdict.action is not Action.APPLY:
            guard.attempt.undo()
        evidence = self._evidence(step, verdict, reduced)
        verdict = self._reconsidered(step, verdict, reduced, observation)
        named = self._attribution(step.batch, verdict)
        verdict = self._within_share(step, verdict, named)
        self._record(step, verdict, evidence)
        match verdict.action:
            case Action.APPLY:
                self._apply(step, reduced)
            case Action.SKIP:
                self._skip(step, verdict, named)
            case Action.OVERFLOW:
                self._overflowed(step, verdict)
            case Action.ROLLBACK:
                self._roll_back_for(step, verdict)
            case Action.PAUSE:
                self._ask(step, verdict, reduced, observation, named)
            case Action.RETRY:  # the ledger has not moved: the same batch is formed again
                guard.gate.leave_out()
            case Action.HALT:
                guard.gate.leave_out()
                self._halt(verdict)
        return verdict

    def noted(self, step: Step, verdict: Verdict) -> None:
        """Put on the record what was found about a step that is applied already."""
        self._guard.incident = verdict.incident
        self._record(step, verdict, {})

    def _record(self, step: Step, verdict: Verdict, evidence: dict[str, Any]) -> None:
        """Write what was found, and what it means for an incident."""
        guard = self._guard
        if verdict.findings:
            self._explain(step, verdict, evidence)
        if verdict.incident_state:
            message, data = guard.controller.incident_line(verdict)
            guard.say("incident", message, **data)
        guard.tiers.withdraw(guard.controller.incidents.since)

    def _reconsidered(
        self, step: Step, verdict: Verdict, reduced: ReducedStep, observation: Observation
    ) -> Verdict:
        """The verdict in the light of its incident's cause, which is on the record before anything
        takes effect.
        """
        guard = self._guard
        if self.judge is None or not guard.controller.needs_cause_test(verdict):
            return verdict
        diagnosis = guard.controller.classify_shift(observation, self.judge(step, verdict, reduced))
        guard.say(
            "cause",
            f"cause of incident {verdict.incident}: {diagnosis.cause.value}: {diagnosis.reason}",
            **msgspec.to_builtins(diagnosis),
            incident=verdict.incident,
            at_step=step.number,
            batch=[step.batch.first, step.batch.last],
            onset=verdict.onset,
            signals=sorted(signals_of(verdict.findings)),
        )
        step.verdict = guard.controller.apply_diagnosis(observation, verdict, diagnosis)
        guard.account.judged(step.verdict.action)
        return step.verdict

    def _find_cause(self, step: Step, verdict: Verdict, reduced: ReducedStep) -> Diagnosis:
        guard = self._guard
        assert guard.replays is not None
        settings = guard.controller.settings
        asks = guard.mode is Mode.ASK or any(rung.do == "pause" for rung in settings.ladder)
        return CauseTest(guard.replays, ledger=guard.ledger, ring=guard.tiers.ring).run(
            step.batch,
            verdict=verdict,
            reduced=reduced,
            applied=guard.controller.applied,
            reach=FAR * settings.skips if settings.shift == "learn" else 0,
            end=guard.total_steps,
            keep_gradients=asks,  # a person may have the update applied all the same
        )

    def _apply(self, step: Step, reduced: ReducedStep) -> None:
        guard = self._guard
        effects = guard.effects(step.number)
        if effects.reset:
            guard.gate.reset_moments()
        factor = guard.gate.factor(reduced, embed_alpha=effects.embed_alpha, clip=effects.clip)
        if guard.updates is not None:
            guard.account.measured(guard.updates.before)
        guard.gate.apply(factor, lr_factor=effects.lr, embed_alpha=effects.embed_alpha)
        if guard.updates is not None:
            guard.account.measured(guard.updates.after)
        if guard.loss_scale is not None:
            guard.loss_scale.update(overflow=False)
        guard.checks.advance_schedule()
        step.applied = True
        guard.step = step.number
        guard.tokens += reduced.tokens
        guard.ledger.passed(step.batch, applied=True)
        guard.state.settle()

    def _within_share(self, step: Step, verdict: Verdict, named: Attribution | None) -> Verdict:
        """The verdict, or where it would leave out more than the guard may by itself: a question,
        or the end.

        It is asked where somebody can answer: in the mode `ask`, and while a screen is open.
        """
        guard = self._guard
        decided = verdict.would if verdict.action is Action.PAUSE else verdict.action
        if decided not in (Action.SKIP, Action.ROLLBACK):
            return verdict
        over = guard.over_share(self._span(step, verdict, decided, named))
        if not over:
            return verdict
        asks = guard.mode is Mode.ASK or guard.shared(
            guard.run is not None and guard.run.screens() > 0
        )
        step.verdict = msgspec.structs.replace(
            verdict,
            action=Action.PAUSE if asks else Action.HALT,
            would=Action.HALT if asks else None,
            beyond=decided,
            reason=f"{verdict.reason}; but {over}",
        )
        guard.account.judged(step.verdict.action)
        return step.verdict

    def _span(
        self,
        step: Step,
        verdict: Verdict,
        action: Action,
        named: Attribution | None,
        *,
        allowed: bool = False,
    ) -> Span:
        """What a skip or a rollback leaves out."""
        if action is Action.ROLLBACK:
            assert verdict.window is not None
            onset = verdict.onset or step.number
            return self._guard.timelines.span(
                window=verdict.window,
                onset=onset,
                reason=verdict.reason,
                verdict=verdict,
                allowed=allowed,
            )
        return Span(
            first=step.batch.first,
            last=step.batch.last,
            cause="rejected",
            step=step.number,
            reason=verdict.reason,
            positions=() if named is None else named.positions,
            allowed=allowed,
        )

    def _skip(
        self, step: Step, verdict: Verdict, named: Attribution | None, *, allowed: bool = False
    ) -> None:
        guard = self._guard
        guard.gate.leave_out()
        batch = step.batch
        span = self._span(step, verdict, Action.SKIP, named, allowed=allowed)
        if named is None:
            guard.quarantine.leave_out(span, verdict.remedies)
        else:
            documents, texts = guard.quarantine.describe, self._texts
            samples = guard.slow_work(
                lambda: told(named, ledger=guard.ledger, texts=texts, documents=documents)
            )
            guard.quarantine.leave_out(span, verdict.remedies, samples=samples)
        if not span.positions:
            guard.ledger.passed(batch, applied=False)
        # Else it is given back, and the next batch is formed from the same place without those
        # samples.

    def _attribution(self, batch: Batch, verdict: Verdict) -> Attribution | None:
        """The samples that a skipped batch owes its trouble to, where a replay has shown that it is
        the data.
        """
        guard = self._guard
        known = (
            guard.controller.diagnoses.of.get(verdict.incident)
            if verdict.incident is not None
            else None
        )
        if (
            guard.replays is None
            or known is None
            or verdict.action is not Action.SKIP
            or not known.cause.of_data
        ):
            return None
        applied = guard.controller.applied
        return attribute(
            batch, verdict=verdict, replays=guard.replays, ledger=guard.ledger, applied=applied
        )

    def _overflowed(self, step: Step, verdict: Verdict) -> None:
        """Leave the update out at a lower loss scale. The data is not to blame, so nothing is
        quarantined.
        """
        guard = self._guard
        assert guard.loss_scale is not None
        guard.gate.leave_out()
        scale = guard.loss_scale.update(overflow=True)
        batch = step.batch
        passed = f"positions {batch.first} to {batch.last - 1} are passed by"
        guard.say(
            "note",
            f"{verdict.reason}: {passed}, and it is {scale:g} now",
            overflow=True,
            loss_scale=scale,
        )
        guard.ledger.passed(batch, applied=False)

    def _roll_back_for(self, step: Step, verdict: Verdict, *, allowed: bool = False) -> None:
        guard = self._guard
        assert verdict.window is not None
        guard.gate.leave_out()
        onset = verdict.onset or step.number
        done = guard.timelines.roll_back(
            window=verdict.window,
            onset=onset,
            reason=verdict.reason,
            verdict=verdict,
            allowed=allowed,
        )
        if not done:
            self._halt(verdict)

    def _halt(self, verdict: Verdict) -> None:
        self._guard.end(Phase.HALTED, verdict.reason, onset=verdict.onset)

    def _ask(
        self,
        step: Step,
        verdict: Verdict,
        reduced: ReducedStep,
        observation: Observation,
        named: Attribution | None,
    ) -> None:
        """Park with the gradients kept, until a person (or the deadline) has decided."""
        guard = self._guard
        would = verdict.would or Action.ROLLBACK
        asked = time.perf_counter()
        question, command = (
            f"{verdict.reason}; proposed: {would.value}",
            (reduced.command_kind, reduced.command_value),
        )
        answer = guard.desk.park(question, verdict=verdict, batch=step.batch, command=command)
        step.began += time.perf_counter() - asked  # a person's time is not the step's
        if answer is ParkResult.GO_ON and verdict.beyond is Action.ROLLBACK:
            self._roll_back_for(step, verdict, allowed=True)
        elif answer is ParkResult.GO_ON and verdict.beyond is not None:
            self._skip(step, verdict, named, allowed=True)
        elif (
            answer is ParkResult.GO_ON
            and math.isfinite(reduced.loss)
            and math.isfinite(reduced.grad_norm)
        ):
            guard.controller.overrule(observation)
            guard.attempt.redo()
            guard.account.rated(guard.rate(step.number))
            self._apply(step, reduced)
            guard.account.judged(Action.APPLY)
        elif answer is ParkResult.GO_ON and self._guard.ledger.nothing_left(
            step.batch.first, step.batch.last
        ):
            self._halt(verdict)
        elif answer is ParkResult.GO_ON:
            self._skip(step, verdict, None, allowed=True)
        elif answer is ParkResult.AS_PROPOSED and would is Action.ROLLBACK:
            self._roll_back_for(step, verdict)
        elif answer is ParkResult.AS_PROPOSED:
            guard.gate.leave_out()
            self._halt(verdict)
        else:  # stopped, rolled back or skipped by hand: it is done
            guard.gate.leave_out()

    def _evidence(self, step: Step, verdict: Verdict, reduced: ReducedStep) -> dict[str, Any]:
        """Where the numbers come from: parameters of a non-finite gradient on every rank, the
        module of a non-finite loss, the tokens of an embedding in trouble. Asked while the
        gradients of the step are at hand."""
        guard = self._guard
        data: dict[str, Any] = {}
        nonfinite = {
            f.signal
            for f in verdict.findings
            if f.kind in (FindingKind.NONFINITE, FindingKind.SCALE_COLLAPSE)
        }
        if nonfinite - {LOSS}:
            named = guard.gathered(guard.probes.names_of_nonfinite())
            data["parameters"] = {
                str(r): names[:MAX_NAMED] for r, names in enumerate(named) if names
            }
        if LOSS in nonfinite and self._rerun is not None:
            modules = {
                str(rank): name
                for rank, name in enumerate(guard.gathered(self._culprit(self._rerun)))
                if name
            }
            if modules:
                data["modules"] = modules
        return data | token_evidence(
            verdict,
            reduced,
            embedding=guard.probes.embedding,
            samples=step.batch.samples,
            gathered=guard.gathered,
            describe=self._tokens,
        )

    def _explain(self, step: Step, verdict: Verdict, evidence: dict[str, Any]) -> None:
        """The verdict with what led to it."""
        guard = self._guard
        reason = verdict.reason
        if modules := evidence.get("modules"):
            reason += "; first non-finite output: " + ", ".join(
                f"{m} on rank {r}" for r, m in modules.items()
            )
        noted = verdict.action is Action.APPLY and verdict.would is None
        advised = verdict.would is not None and verdict.action in (Action.APPLY, Action.OVERFLOW)
        does = (
            advised_words(verdict.would.value)
            if advised and verdict.would is not None
            else verdict.action.value
        )
        kind, what = ("finding", "step") if noted else ("verdict", f"{does} at step")
        guard.say(
            kind,
            f"{what} {step.number}: {reason}",
            action=verdict.action.value,
            would=verdict.would.value if verdict.would else None,
            **({"beyond": verdict.beyond.value} if verdict.beyond else {}),
            findings=list(verdict.findings),
            onset=verdict.onset,
            window=list(verdict.window) if verdict.window else None,
            incident=guard.incident,
            batch=[step.batch.first, step.batch.last],
            at_step=step.number,
            **evidence,
        )

    def _culprit(self, rerun: Callable[[], None]) -> str:
        state = self._guard.state
        aside = ForwardSideEffects(state)
        aside.begin()
        try:
            with torch.compiler.set_stance("force_eager"):  # what is compiled calls no hooks
                return first_nonfinite(state.model, rerun)
        finally:
            aside.undo()
            state.settle()
