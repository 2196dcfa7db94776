"""Ask the controller for the verdict of a step."""

from __future__ import annotations

from guardrail.core.records.findings import Observation
from guardrail.core.records.verdicts import Verdict
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.loop_checks import LoopChecks
from guardrail.torch.guard.step import Step
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.measure.reduced_step import ReducedStep


class StepJudge:
    """Turns the reduced numbers of a step into a verdict; the same on every rank."""

    def __init__(self, ctx: RunContext, *, checks: LoopChecks, metrics: StepMetrics) -> None:
        self._ctx = ctx
        self._checks = checks
        self._metrics = metrics

    def judge(self, step: Step, reduced: ReducedStep, *, lr: float) -> tuple[Observation, Verdict]:
        """Return the observation and the verdict of a step, and begin its metrics row.

        Args:
            lr: learning rate that an update of this step is made with.
        """
        controller = self._ctx.controller
        observation = Observation(
            step=step.number,
            first=step.batch.first,
            last=step.batch.last,
            signals=reduced.signals(),
            nonfinite_loss=reduced.nonfinite_loss,
            nonfinite_grad=reduced.nonfinite_grad,
            tokens=reduced.tokens,
            streak=step.batch.streak,
            overflow=reduced.overflow,
        )
        if reduced.lacking:
            self._checks.name_lacking(step)
        bands = controller.bands()
        verdict = controller.observe(observation)
        step.verdict = verdict
        self._metrics.begin(step, reduced, verdict, bands, lr)
        return observation, verdict
