"""Mistakes of a custom training loop that raise no exception in PyTorch.

What is a mistake for certain raises an error, at the first step if possible. What may be intended
is a note in the journal. For `optimizer.step` see `Gate`, for `scheduler.step` `GuardedScheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from guardrail.core.errors import UsageError
from guardrail.core.events.run_state import Note
from guardrail.core.records.spans import MAX_NAMED
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.measure.rounding import HalfWeights

MAX_LACKING_NOTES = 3  # more notes about layers that only some batches use would fill the journal


class LoopChecks:
    """Checks of one guard; every rank calls the same methods at the same steps.

    Args:
        reduction: knows which parameters have gradients.
        learning_rate: step -> the rate that its update is made with.
        averages_gradients: whether the model or the layout of the ranks says how gradients are
            combined over the ranks.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        reduction: StepReduction,
        learning_rate: Callable[[int], float],
        averages_gradients: bool,
    ) -> None:
        self._ctx = ctx
        self._reduction = reduction
        self._learning_rate = learning_rate
        self._averages_gradients = averages_gradients
        self._half_weights = HalfWeights(reduction.parameters, apart=reduction.embedding)
        # whether the first step of this process was checked for gradients
        self._is_checked = False
        self._lacking_notes = 0

    def note_unreduced_gradients(self) -> None:
        """Note at a start that each rank may train a model of its own. A collective.

        It is no error, because a loop may average the gradients itself.
        """
        ranks = self._ctx.ranks
        if ranks.world == 1 or any(ranks.gather(self._averages_gradients)):
            return
        message = (
            f"{ranks.world} ranks train, but the model is not wrapped in DDP and has no FSDP2 or "
            "tensor-parallel parameters. Unless your loop averages the gradients over the ranks, "
            "each rank trains a different model"
        )
        self._ctx.recorder.write(Note(message=message, data={"unreduced_ranks": ranks.world}))

    def refuse_without_gradients(self, step: Step, reduced: ReducedStep) -> None:
        """Check once, at the first step of this process, that the model gets gradients.

        Raises:
            UsageError: no rank has a gradient; raised on every rank.
        """
        if self._is_checked or not math.isfinite(reduced.loss):
            return
        self._is_checked = True
        if not reduced.graded:
            raise UsageError(
                f"step {step.number}: no parameter got a gradient. Give the guard the model that "
                "computes the loss, and call no zero_grad between backward and step.finish",
                kind="no_gradients",
            )
        if reduced.grad_norm == 0 and not reduced.nonfinite_grad:
            message = (
                f"every gradient of step {step.number} is exactly zero, so this update trains "
                "nothing. Was zero_grad called between backward and step.finish?"
            )
            self._ctx.recorder.write(Note(message=message))

    def name_lacking(self, step: Step) -> None:
        """Note parameters that had gradients before and got none in this step.

        A collective; each parameter is named once.
        """
        gathered = self._ctx.ranks.gather(self._reduction.take_lacking_names())
        names = sorted({name for found in gathered for name in found})
        self._lacking_notes += bool(names)
        if names and self._lacking_notes <= MAX_LACKING_NOTES:
            rest = ""
            if len(names) > MAX_NAMED:
                rest = f", and {len(names) - MAX_NAMED} more"
            message = (
                f"{len(names)} parameters had gradients before and got none in step {step.number}: "
                f"{', '.join(names[:MAX_NAMED])}{rest}. "
                "This is normal for layers that only some batches use. Otherwise look for a detach "
                "or a frozen layer"
            )
            note = Note(message=message, data={"parameters": names[:MAX_NAMED]})
            self._ctx.recorder.write(note)

    def note_lost_updates(self, step: Step) -> None:
        """Note once where updates are lost in the rounding of 16-bit weights."""
        half = self._half_weights
        share = half.count_update()
        if share is not None:
            message = (
                f"{share:.0%} of the sampled {half.dtype} weights have not changed in the last "
                f"{half.span} updates: at a learning rate of "
                f"{self._learning_rate(step.number):.3g} an update is smaller than the distance "
                f"between two {half.dtype} numbers. Keep the weights in float32 and compute in 16 "
                "bits by autocast, or use a larger learning rate"
            )
            self._ctx.recorder.write(Note(message=message, data={"unchanged": share}))
