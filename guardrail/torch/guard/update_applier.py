"""Apply the update of a step and count it. With a deferred gate the device decides."""

from __future__ import annotations

from torch import Tensor

from guardrail.decide.run_history import Effects
from guardrail.decide.sample_cursor import CursorState
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.device_numbers import DeviceNumbers
from guardrail.torch.guard.guarded_scheduler import GuardedScheduler
from guardrail.torch.guard.step import Step
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.measure.loss_scaler import LossScale
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.update_gate import Gate
from guardrail.torch.measure.update_norm import UpdateNorm
from guardrail.torch.state.training_state import TrainingState


class UpdateApplier:
    """The only part that changes weights in a step, and that advances step, tokens and cursor.

    Args:
        gate: steps the optimizers.
        scaler: of fp16; None: nothing scales the loss.
        scheduler: of the learning rate.
        update_norm: measures each update; None: it is not measured.
        state: of the training, settled after each update.
        metrics: counts the time of the measurement as the guard's.
    """

    def __init__(
        self,
        ctx: RunContext,
        gate: Gate,
        scaler: LossScale | None,
        scheduler: GuardedScheduler,
        update_norm: UpdateNorm | None,
        *,
        state: TrainingState,
        metrics: StepMetrics,
    ) -> None:
        self._ctx = ctx
        self.gate = gate
        self._scaler = scaler
        self._scheduler = scheduler
        self.device_numbers = DeviceNumbers(gate.optimizers[0], scaler)
        self._update_norm = update_norm
        self._state = state
        self._metrics = metrics

    def learning_rate(self, step: int) -> float:
        """Return the learning rate that the update of a step is made with.

        Waits for the device if the optimizer keeps it there; `device_numbers` does not.
        """
        rate = float(self.gate.optimizers[0].param_groups[0]["lr"])
        return rate * self._ctx.effects(step).lr

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by; None: nothing scales it."""
        if self._scaler is None:
            return None
        return self._scaler.value

    @property
    def update_square(self) -> Tensor | None:
        """Squared norm of the last update, 0-d; None: it is not known."""
        if self._update_norm is None:
            return None
        return self._update_norm.square

    def skip(self) -> None:
        """Drop the accumulated gradients instead of applying them."""
        self.gate.drop_gradients()

    def lower_loss_scale(self) -> float:
        """Return the lower loss scale that is used after an overflow."""
        assert self._scaler is not None
        return self._scaler.update(overflow=True)

    def apply(self, step: Step, reduced: ReducedStep) -> None:
        """Apply the update of a judged step."""
        effects = self._ctx.effects(step.number)
        if effects.reset:
            self.gate.reset_moments()
        factor = self.gate.factor(reduced, embed_alpha=effects.embed_alpha, clip=effects.clip)
        self._update(factor, effects, embed_alpha=effects.embed_alpha)
        if self._scaler is not None:
            self._scaler.update(overflow=False)
        self.confirm(step, reduced)
        self._move_on(step)

    def apply_on_device(
        self, step: Step, *, norm: Tensor, scale: Tensor, applied: Tensor, began: float
    ) -> None:
        """Apply the update if the device has decided so, and continue as if it were applied.

        Args:
            norm: of the gradient, 0-d, on the device.
            scale: the factor on the gradient, 0-d, on the device.
            applied: whether the update is applied; bool, 0-d, on the device.
            began: `time.perf_counter()`. The time from then until the update is the guard's.
        """
        effects = self._ctx.effects(step.number)
        factor = self.gate.factor_on_device(norm, scale, clip=effects.clip)
        self._metrics.measure_since(began)
        self._update(factor, effects, unless=(~applied).float())
        self._move_on(step)

    def _update(
        self,
        factor: float | Tensor,
        effects: Effects,
        *,
        embed_alpha: float = 1.0,
        unless: Tensor | None = None,
    ) -> None:
        if self._update_norm is not None:
            self._metrics.measure(self._update_norm.before)
        self.gate.apply(factor, lr_factor=effects.lr, embed_alpha=embed_alpha, unless=unless)
        if self._update_norm is not None:
            self._metrics.measure(self._update_norm.after)

    def confirm(self, step: Step, reduced: ReducedStep) -> None:
        """Count an applied update: step the schedule, and add its tokens."""
        self._scheduler.advance()
        step.applied = True
        self._ctx.progress.tokens += reduced.tokens

    def _move_on(self, step: Step) -> None:
        self._ctx.progress.step = step.number
        self._ctx.order.advance(step.batch, applied=True)
        self._state.reshard()

    def take_back(self, step: Step, *, position: CursorState, update_square: Tensor | None) -> None:
        """Restore step and cursor from before a step whose update the device has skipped.

        Args:
            position: of the cursor before it.
            update_square: squared norm of the update before it.
        """
        self._ctx.progress.step = step.number - 1
        self._ctx.order.restore(position)
        if self._update_norm is not None:
            self._update_norm.square = update_square
