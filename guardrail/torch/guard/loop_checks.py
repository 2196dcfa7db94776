"""Mistakes of a custom training loop that would go unnoticed: it trains another model, or steps
something itself.

What cannot be meant is an error, at the first step where that is possible. What may be meant is a
note in the journal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from guardrail.core.errors import UsageError
from guardrail.core.records import MAX_NAMED
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduction import ReducedStep
from guardrail.torch.measure.rounding import HalfWeights

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard

MAX_LACKING_NOTES = 3  # layers that only some batches use would fill the journal


class LoopChecks:
    """Of one guard; every rank calls the same methods at the same steps. For `optimizer.step` see
    `Gate`.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._half_weights = HalfWeights(guard.probes.parameters, apart=guard.probes.embedding)
        # whether the first step of this process has been looked at for gradients
        self._trains = False
        self._lacking_notes = 0
        # position of the scheduler after its last step by the guard
        self._scheduled: int | None = None

    # -- gradients ---------------------------------------------------------------------------------

    def refuse_without_gradients(self, step: Step, reduced: ReducedStep) -> None:
        """Once, at the first step of this process. Every rank raises UsageError if no rank has a
        gradient.
        """
        if self._trains or not math.isfinite(reduced.loss):
            return
        self._trains = True
        if not reduced.graded:
            raise UsageError(
                f"step {step.number}: no parameter got a gradient: is the model that computes the loss the one that "
                "the guard has? (Or was zero_grad called between backward and step.finish?)"
            )
        if reduced.grad_norm == 0 and not reduced.nonfinite_grad:
            self._guard.say(
                "note",
                f"every gradient of step {step.number} is exactly zero, so this update trains nothing: was zero_grad "
                "called between backward and step.finish?",
            )

    def name_lacking(self, step: Step) -> None:
        """Note parameters that had gradients before and got none in this step. A collective; each
        is named once.
        """
        guard = self._guard
        names = sorted(
            {name for found in guard.gathered(guard.probes.take_lacking()) for name in found}
        )
        self._lacking_notes += bool(names)
        if names and self._lacking_notes <= MAX_LACKING_NOTES:
            rest = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            guard.say(
                "note",
                f"{len(names)} parameters had gradients before and got none in step {step.number}: "
                f"{', '.join(names[:MAX_NAMED])}{rest}. "
                "This is normal for layers that only some batches use; otherwise look for a detach or a frozen layer",
                parameters=names[:MAX_NAMED],
            )

    def note_lost_updates(self, step: Step) -> None:
        """Note once where updates are lost in the rounding of 16-bit weights."""
        half = self._half_weights
        share = half.count_update()
        if share is not None:
            self._guard.say(
                "note",
                f"{share:.0%} of the sampled {half.dtype} weights have not changed in the last {half.span} updates: "
                f"at a learning rate of {self._guard.rate(step.number):.3g} an update is smaller than the distance "
                f"between two {half.dtype} numbers. Keep the weights in float32 and compute in 16 bits by autocast, "
                "or use a larger learning rate",
                unchanged=share,
            )

    # -- the schedule ------------------------------------------------------------------------------

    def advance_schedule(self) -> None:
        """Step the scheduler after an applied update. Raises UsageError if the loop has stepped it
        too.
        """
        scheduler = self._guard.scheduler
        if scheduler is None:
            return
        if self._scheduled is not None and self._scheduled != self._schedule_position():
            raise UsageError(
                "the loop called scheduler.step() itself: the guard steps the scheduler after each applied update. "
                "Remove scheduler.step() from the loop"
            )
        scheduler.step()
        self._scheduled = self._schedule_position()

    def schedule_restored(self) -> None:
        """The scheduler's state was loaded: it counts on from there."""
        self._scheduled = self._schedule_position()

    def _schedule_position(self) -> int | None:
        """How often torch's schedulers say that they were stepped; None for others."""
        position = getattr(self._guard.scheduler, "last_epoch", None)
        return position if isinstance(position, int) else None
