"""Decide on the device, without waiting for it (`guard.decide = "deferred"`).

The host reads the numbers of a step one step later. When step t is computed, the host knows all
steps up to t-1. So it knows one limit for each signal (`Controller.safe_limits`): a step below all
limits is applied without a finding. The limits are sent to the device with the packed vector. The
device compares them. Where a number is not below its limit, the optimizer skips the update by
`found_inf`. The host continues with the next step, and then reads:

    applied     the controller accepts the step, as the limits promised; the update is counted now.
    skipped     the update did not happen, and the step that was computed after it does not count.
                The same batch is computed again, with the same number and RNG state. This time the
                host waits, judges and acts as usual. If the second numbers differ from the first,
                the first ones count, since that is how broken hardware behaves.

A rejected or noted step costs two more steps. A healthy one costs no wait, and nothing is copied.

The host also waits

- for a step whose outcome is needed next: for a snapshot, a checkpoint, an evaluation, the end;
- while no limits can be given: in the first steps, in an open incident, and while a remedy acts on
  the embedding.

A command or a stop signal that came with a step is read one step later. The step that was computed
meanwhile is dropped first, with all that the loop did in it. What is then saved, restored or shown
is the state after the step that the command came with.

The results equal those of `decide = "before_step"`, bit by bit, where computing a batch twice gives
the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from guardrail.core.errors import UsageError
from guardrail.core.records.findings import Observation
from guardrail.core.records.verdicts import Action
from guardrail.decide.sample_cursor import CursorState
from guardrail.torch.guard.between_steps import BetweenSteps
from guardrail.torch.guard.context import RunContext
from guardrail.torch.guard.side_effects import StepSideEffects
from guardrail.torch.guard.step import Step
from guardrail.torch.guard.step_judge import StepJudge
from guardrail.torch.guard.step_metrics import StepMetrics
from guardrail.torch.guard.update_applier import UpdateApplier
from guardrail.torch.guard.verdict_executor import VerdictExecutor
from guardrail.torch.measure.gradient_norms import to_local
from guardrail.torch.measure.reduced_step import ReducedStep
from guardrail.torch.measure.reduction import StepReduction, pack_numbers, upload_numbers
from guardrail.torch.measure.update_gate import can_skip_on_device
from guardrail.torch.state.forward_side_effects import ForwardSideEffects


@dataclass(kw_only=True, slots=True)
class PendingStep:
    """A step whose update the device has decided, and whose numbers the host has not read.

    Attributes:
        nominal: see `Step.finish`.
        numbers: the packed vector, whether the update was applied, and the values of
            `DeviceNumbers`; on the host once `arrived`.
        slots: length of the packed vector.
        arrived: event after the copy to the host; None where the numbers are on the host at once.
        position: of the cursor before it.
        side_effects: RNG states and buffers that it began with.
        update_square: squared norm of the update before it.
        rate: learning rate of its update without remedies; None: it is among the numbers.
        lr_factor: of the remedies, on that learning rate.
        seconds, guarding: its time, and the guard's part of that.
    """

    step: Step
    nominal: float | None
    numbers: Tensor
    arrived: torch.cuda.Event | None
    position: CursorState
    side_effects: ForwardSideEffects
    update_square: Tensor | None
    slots: int
    rate: float | None
    lr_factor: float
    seconds: float = 0.0
    guarding: float = 0.0


class DeferredGate:
    """Decides on the device, and reads the numbers of a step when the next one is computed.

    Args:
        applier: applies updates.
        reduction: of the present step.
        metrics: of the present step.
        judge: asks the controller.
        executor: carries out what is found later.
        side_effects: of the present step.
        between_steps: what is done after the loop body of a step.
        needs_outcome: returns whether the outcome of step number N is needed right after it.
        tolerance: returns the relative difference within which a step that is computed again is
            the same.

    Attributes:
        pending: the step whose numbers were not read yet.
        waited_steps: steps that the host has waited for.
        deferred_steps: all others.

    Raises:
        UsageError: an update cannot be skipped on the device, or would not be the same one.
    """

    def __init__(
        self,
        ctx: RunContext,
        applier: UpdateApplier,
        *,
        reduction: StepReduction,
        metrics: StepMetrics,
        judge: StepJudge,
        executor: VerdictExecutor,
        side_effects: StepSideEffects,
        between_steps: BetweenSteps,
        needs_outcome: Callable[[int], bool],
        tolerance: Callable[[], float],
    ) -> None:
        self._ctx, self._applier = ctx, applier
        self._reduction, self._metrics, self._judge = reduction, metrics, judge
        self._executor, self._side_effects = executor, side_effects
        self._between_steps, self._needs_outcome = between_steps, needs_outcome
        self._tolerance = tolerance
        self.pending: PendingStep | None = None
        self._signals: tuple[str, ...] = ()  # of the last step that was judged
        self._dropped = 0  # number of the step that is computed again; 0: none
        # its numbers of the first time, where the device skipped it
        self._first: tuple[ReducedStep, Tensor] | None = None
        self.waited_steps = 0
        self.deferred_steps = 0
        self._refuse_unusable()

    def _refuse_unusable(self) -> None:
        """Raise UsageError for an optimizer, scaler, clipping or parameter that needs the host."""
        gate = self._applier.gate
        for one in gate.optimizers:
            if not can_skip_on_device(one):
                raise UsageError(
                    f'guard.decide = "deferred": {type(one).__name__} ignores found_inf. Use an '
                    "optimizer with fused=True"
                )
        needs_host = ""
        if callable(gate.clip):
            needs_host = "a function that clips"
        if self._applier.loss_scale is not None:
            needs_host = "a gradient scaler"
        if needs_host:
            raise UsageError(
                f'guard.decide = "deferred": {needs_host} needs the numbers of a step at once. '
                'Use decide = "before_step"'
            )
        for parameter in self._reduction.parameters:
            here = to_local(parameter)
            if (
                here.dtype not in (torch.float32, torch.float64)
                or here.device.type != self._reduction.device.type
            ):
                raise UsageError(
                    f'guard.decide = "deferred" needs fp32 parameters on the device, not '
                    f"{here.dtype} on {here.device}"
                )

    # -- between two steps -------------------------------------------------------------------------

    def begin(self) -> bool:
        """Begin another step; return whether it repeats one that was dropped."""
        pending = self.pending
        if pending is not None and pending.side_effects is self._side_effects.current:
            self._side_effects.swap()
        repeated = self._dropped == self._ctx.progress.step + 1
        self._dropped = 0
        return repeated

    # -- the step that was computed ----------------------------------------------------------------

    def safe_limits(self, step: Step, *, wait: bool) -> list[float] | None:
        """Return the limits of this step's signals; None: the host has to wait.

        In the order of `StepReduction.signal_names`; NaN for a signal without a limit.
        """
        effects = self._ctx.effects(step.number)
        limits: dict[str, float] | None = None
        must_wait = wait or self._needs_outcome(step.number) or self._first is not None
        # These two remedies are made on the host.
        must_wait |= effects.embed_alpha != 1.0 or effects.reset
        if not must_wait:
            like = Observation(
                step=step.number,
                first=step.batch.first,
                last=step.batch.last,
                signals=dict.fromkeys(self._signals, math.nan),
                streak=step.batch.streak,
            )
            limits = self._ctx.controller.safe_limits(like)
        if limits is None:
            self.waited_steps += 1
            return None
        self.deferred_steps += 1
        return [limits.get(name, math.nan) for name in self._reduction.signal_names]

    @torch.no_grad()
    def decide(
        self, step: Step, vector: Tensor, safe_limits: list[float], *, nominal: float | None
    ) -> None:
        """Let the device decide and apply, and continue as if the update were applied."""
        began = time.perf_counter()
        values, known, sound, scale = self._reduction.unpack_on_device(vector, nominal)
        limits = upload_numbers(safe_limits, vector.device, vector.dtype)
        # NaN is below no limit. A number that no rank gave is not judged, as on the host.
        applied = sound & (values[0] > 0) & ((values <= limits) | ~known).all()
        device_numbers = self._applier.device_numbers
        numbers = pack_numbers(vector, [applied, *device_numbers.tensors()])
        arrived = None
        if numbers.device.type == "cuda":
            on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = on_host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending = PendingStep(
            step=step,
            nominal=nominal,
            numbers=numbers,
            slots=len(vector),
            arrived=arrived,
            position=self._ctx.order.state(),
            side_effects=self._side_effects.current,
            update_square=self._applier.update_square,
            rate=device_numbers.host_rate(),
            lr_factor=self._ctx.effects(step.number).lr,
        )
        self._applier.apply_on_device(
            step, norm=values[1], scale=scale, applied=applied, began=began
        )
        self.pending.seconds = time.perf_counter() - step.began
        self.pending.guarding = self._metrics.guarding

    # -- the step before it ------------------------------------------------------------------------

    def read_result(self) -> bool:
        """Read the numbers of the pending step, if any.

        Returns:
            False: the step that was computed after it does not count.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        if pending.arrived is not None:
            # The device computes the next step meanwhile, so it has work while the host waits.
            pending.arrived.synchronize()
        # Whether the next step was computed meanwhile.
        computed_after = self._side_effects.current is not pending.side_effects
        numbers = pending.numbers.tolist()
        values, (applied, *more) = numbers[: pending.slots], numbers[pending.slots :]
        rate = self._applier.device_numbers.take(more, host_rate=pending.rate)
        reduced = self._reduction.unpack(values, pending.nominal, None)
        if not applied:
            self._take_back(pending, reduced, computed_after=computed_after)
            return False
        observation, verdict = self._judge.judge(pending.step, reduced, lr=rate * pending.lr_factor)
        self.record(observation.signals)
        is_late = verdict.action is not Action.APPLY
        if computed_after and (is_late or reduced.is_request):
            # First, since RNG state and buffers must be those of the pending step when they are
            # saved or restored.
            self._drop(pending.step.number + 1)
        self._applier.confirm(pending.step, reduced)
        self._metrics.add(pending.step, reduced, seconds=pending.seconds, guarding=pending.guarding)
        if is_late:
            self._executor.roll_back_late(pending.step, observation, verdict)
        else:
            self._executor.record_applied(pending.step, verdict)
            self._between_steps.set_applied(True)
        self._between_steps.handle_requests(reduced)
        if is_late or reduced.is_request:
            return False
        self._between_steps.finish_previous_step()
        return True

    def _take_back(
        self, pending: PendingStep, reduced: ReducedStep, *, computed_after: bool
    ) -> None:
        """Restore the beginning of a step whose update was skipped; it is computed again."""
        step = pending.step
        if computed_after:
            self._drop(step.number)
            self._side_effects.swap()
        self._first = reduced, self._reduction.own
        self._drop(step.number)
        self._applier.take_back(
            step, position=pending.position, update_square=pending.update_square
        )
        if reduced.incomplete:
            self._executor.end_incomplete()

    def _drop(self, number: int) -> None:
        """Undo what was computed last; step `number` comes next."""
        self._side_effects.undo()
        self._applier.skip()
        self._reduction.discard()
        self._dropped = number

    # -- the same step again -----------------------------------------------------------------------

    def first_command(self) -> tuple[int, float] | None:
        """Return the command that came with the first time and was not carried out.

        None: this step is not computed again. Ranks other than 0 return no command.
        """
        if self._first is None:
            return None
        if self._ctx.ranks.rank:
            return 0, 0.0
        first = self._first[0]
        return first.command_kind, first.command_value

    def first_numbers(self, again: ReducedStep) -> ReducedStep:
        """Return the numbers by which a step that is computed again is judged."""
        if self._first is None:
            return again
        (first, own), self._first = self._first, None
        if _is_same(first, again, self._tolerance()):
            return again
        self._reduction.own = own
        return replace(
            first, stop=again.stop, incomplete=again.incomplete, step_times=again.step_times
        )

    def record(self, signals: Mapping[str, float]) -> None:
        """Remember which signals the last judged step had."""
        self._signals = tuple(signals)


def _is_same(a: ReducedStep, b: ReducedStep, relative: float) -> bool:
    """Return whether two attempts gave the same numbers; `relative` is the tolerance."""
    if (a.nonfinite_loss, a.nonfinite_grad) != (b.nonfinite_loss, b.nonfinite_grad):
        return False
    ours, theirs = a.signals(), b.signals()
    if ours.keys() != theirs.keys():
        return False
    for name, value in ours.items():
        both_nan = math.isnan(value) and math.isnan(theirs[name])
        if not both_nan and not math.isclose(value, theirs[name], rel_tol=relative):
            return False
    return True
