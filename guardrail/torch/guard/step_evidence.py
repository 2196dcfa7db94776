"""Find where the bad numbers of a step come from: parameters, modules, tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from guardrail.core.records.findings import FindingKind
from guardrail.core.records.signals import LOSS
from guardrail.core.records.spans import MAX_NAMED
from guardrail.core.records.verdicts import Verdict
from guardrail.torch.diagnose.embedding_tokens import DescribeTokens, build_token_evidence
from guardrail.torch.diagnose.nonfinite_module import find_nonfinite_module
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.state.forward_side_effects import ForwardSideEffects
from guardrail.torch.state.training_state import TrainingState


class StepEvidence:
    """Collects evidence while the gradients of the step are still there. Collectives.

    Args:
        reduction: of the gradients.
        state: of the training, for a forward pass that changes nothing.
        rerun_forward: runs the forward passes of this rank's share of the last batch again; None:
            the module of a non-finite loss stays unknown.
        describe_tokens: see `DescribeTokens`; called on rank 0.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        reduction: StepReduction,
        state: TrainingState,
        rerun_forward: Callable[[], None] | None = None,
        describe_tokens: DescribeTokens | None = None,
    ) -> None:
        self._ctx = ctx
        self._reduction, self._state = reduction, state
        self._rerun_forward = rerun_forward
        self._describe_tokens: DescribeTokens | None = None
        if ctx.ranks.rank == 0:
            self._describe_tokens = describe_tokens

    def collect(self, step: Step, verdict: Verdict, reduced: ReducedStep) -> dict[str, Any]:
        """Return the evidence of a step with findings, for its journal line.

        "parameters" with a non-finite gradient by rank, "modules" of a non-finite loss by rank, and
        the tokens of an embedding with an anomaly.
        """
        gather = self._ctx.ranks.gather
        kinds = (FindingKind.NONFINITE, FindingKind.SCALE_COLLAPSE)
        nonfinite = {finding.signal for finding in verdict.findings if finding.kind in kinds}
        data: dict[str, Any] = {}
        if nonfinite - {LOSS}:
            by_rank = enumerate(gather(self._reduction.find_nonfinite_gradients()))
            data["parameters"] = {str(rank): names[:MAX_NAMED] for rank, names in by_rank if names}
        if LOSS in nonfinite and self._rerun_forward is not None:
            found = enumerate(gather(self._nonfinite_module(self._rerun_forward)))
            modules = {str(rank): name for rank, name in found if name}
            if modules:
                data["modules"] = modules
        return data | build_token_evidence(
            verdict,
            reduced,
            embedding=self._reduction.embedding,
            samples=step.batch.samples,
            gather=gather,
            describe=self._describe_tokens,
        )

    def _nonfinite_module(self, rerun_forward: Callable[[], None]) -> str:
        """Return the name of the module with the first non-finite output; "": there is none."""
        aside = ForwardSideEffects(self._state)
        aside.begin()
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled modules call no hooks
                return find_nonfinite_module(self._state.model, rerun_forward)
        finally:
            aside.undo()
            self._state.reshard()
