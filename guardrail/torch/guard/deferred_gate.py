"""The gate without a synchronisation (`guard.gate = "lagged"`): the host reads the numbers of a
step one step later.

When step t has been computed the host knows all steps up to t-1, so it knows what t must keep to:
one ceiling for each signal (`Controller.safe_limits`), chosen so that a step below all of them is
applied without a word. The ceilings travel to the device beside the packed vector; there they are
compared, and the optimizer leaves the update out by `found_inf` where a number is not below its
own. The host goes on to the next step, and reads behind it:

    applied     what the controller says of the step is what the ceilings promised; the books are brought up to date.
    left out    its update and the step that was computed behind it never happened. The same batch is formed again, with
                the same number and dice, and now the host waits, judges and acts as it always does:
                by the numbers of the first time, if the second gives others, since that is what
                broken hardware looks like.

So a rejected or noted step costs two more, a healthy one no wait, and nothing is copied. The host
also waits for a step that something follows which needs its outcome: a snapshot, a checkpoint, an
evaluation, the end; and while no ceilings can be given (the first steps, an open incident, a remedy
on the embedding). A command or a stop signal that came with a step is found one step later. The
step that was computed meanwhile is dropped first, with all that the loop did in it: what is then
saved, restored or shown to a user is the state after the step that the command came with.

The results are those of the gate that waits, bit by bit, where computing a batch twice gives the
same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guardrail.core.errors import UsageError
from guardrail.core.records import Action, Observation, Phase, Verdict
from guardrail.decide.sample_order import LedgerState
from guardrail.torch.diagnose.batch_replay import tolerance
from guardrail.torch.guard.step import Step
from guardrail.torch.measure.reduction import ReducedStep, local
from guardrail.torch.measure.update_gate import can_leave_out
from guardrail.torch.state.forward_side_effects import ForwardSideEffects

if TYPE_CHECKING:
    from guardrail.torch.guard.guard import Guard


@dataclass(kw_only=True, slots=True)
class PendingStep:
    """A step on whose update the device has decided, and of which the host knows nothing yet.

    Attributes:
        told: the packed vector and, last, whether the update was applied; on the host once
        `arrived`.
        position: of the ledger before it.
        attempt: the dice and buffers that it began with.
        square: of the update before it.
        lr: learning rate of its update.
        seconds, guarding: what it took, and the guard's part of that.
    """

    step: Step
    nominal: float | None
    told: Tensor
    arrived: torch.cuda.Event | None
    position: LedgerState
    attempt: ForwardSideEffects
    square: Tensor | None
    lr: float
    seconds: float = 0.0
    guarding: float = 0.0


class DeferredGate:
    """Raises UsageError where an update could not be left out on the device, or would not be the
    same one.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.flight: PendingStep | None = None
        self._spare = ForwardSideEffects(guard.state)
        self._signals: tuple[str, ...] = ()  # of the last step that was judged
        self._dropped = 0  # number of the step that is formed again, 0: none
        # numbers of its first time, where the device left it out
        self._first: tuple[ReducedStep, Tensor] | None = None
        self.waited = self.flown = 0  # steps that the host has waited for, and others
        self._refuse()

    def _refuse(self) -> None:
        guard = self._guard
        deaf = [type(one).__name__ for one in guard.optimizers if not can_leave_out(one)]
        if deaf:
            raise UsageError(
                f'guard.gate = "lagged" needs an optimizer that heeds found_inf (fused=True): {deaf[0]}'
            )
        if guard.loss_scale is not None or callable(guard.gate.clip):
            what = "a gradient scaler" if guard.loss_scale is not None else "a function that clips"
            raise UsageError(
                f'guard.gate = "lagged" does not go with {what}: it needs the numbers at once'
            )
        for parameter in guard.probes.parameters:
            here = local(parameter)
            if (
                here.dtype not in (torch.float32, torch.float64)
                or here.device.type != guard.probes.device.type
            ):
                raise UsageError(
                    f'guard.gate = "lagged" needs fp32 parameters on the device, not {here.dtype} on {here.device}'
                )

    # -- between two steps -------------------------------------------------------------------------

    def begin(self) -> bool:
        """Another try begins; returns whether it repeats one that was dropped."""
        guard = self._guard
        if self.flight is not None and self.flight.attempt is guard.attempt:
            guard.attempt, self._spare = self._spare, guard.attempt
        repeated, self._dropped = self._dropped == guard.step + 1, 0
        return repeated

    # -- the step that was computed ----------------------------------------------------------------

    def safe_limits(self, step: Step, *, wait: bool) -> list[float] | None:
        """What the signals of this step must keep to, as `Probes.signal_names` has them; None: the
        host has to wait.
        """
        guard = self._guard
        number = step.number
        due = number == guard.total_steps or guard.tiers.copies(number)
        effects = guard.effects(number)
        most: dict[str, float] | None = None
        if not (
            wait or due or self._first is not None or effects.embed_alpha != 1.0 or effects.reset
        ):
            signals = dict.fromkeys(self._signals, math.nan)
            batch = step.batch
            like = Observation(
                step=number,
                first=batch.first,
                last=batch.last,
                signals=signals,
                streak=batch.streak,
            )
            most = guard.controller.safe_limits(like)
        if most is None:
            self.waited += 1
            return None
        self.flown += 1
        return [most.get(name, math.nan) for name in guard.probes.signal_names]

    @torch.no_grad()
    def launch(
        self, step: Step, vector: Tensor, safe_limits: list[float], *, nominal: float | None
    ) -> None:
        """Decide on the device, apply there or not, and go on as if it were applied."""
        began = time.perf_counter()
        guard = self._guard
        probes, effects = guard.probes, guard.effects(step.number)
        values, known, sound, scale = probes.on_device(vector, nominal)
        most = torch.tensor(safe_limits, dtype=vector.dtype).to(vector.device, non_blocking=True)
        # NaN is not below any ceiling. A number that no rank gave is not judged, as on the host.
        applied = sound & (values[0] > 0) & ((values <= most) | ~known).all()
        told = torch.cat([vector, applied.to(vector.dtype)[None]])
        arrived = None
        if told.device.type == "cuda":
            on_host = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
            told = on_host.copy_(told, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        flight = self.flight = PendingStep(
            step=step,
            nominal=nominal,
            told=told,
            arrived=arrived,
            position=guard.ledger.state(),
            attempt=guard.attempt,
            square=guard.updates.square if guard.updates is not None else None,
            lr=guard.rate(step.number),
        )
        if guard.updates is not None:
            guard.account.measured(guard.updates.before)
        factor = guard.gate.factor_on_device(values[1], scale, clip=effects.clip)
        guard.account.guarding += time.perf_counter() - began
        guard.gate.apply(factor, lr_factor=effects.lr, unless=(~applied).float())
        if guard.updates is not None:
            guard.account.measured(guard.updates.after)
        guard.step = step.number
        guard.ledger.passed(step.batch, applied=True)
        guard.state.settle()
        flight.seconds, flight.guarding = time.perf_counter() - step.began, guard.account.guarding

    # -- the step before it ------------------------------------------------------------------------

    def land(self) -> bool:
        """Read the numbers of the step in flight, if any. False: what was computed after it does
        not count.
        """
        flight, self.flight = self.flight, None
        if flight is None:
            return True
        if flight.arrived is not None:
            # the device is one step further on: it has work while the host waits
            flight.arrived.synchronize()
        guard = self._guard
        # whether the next step was computed meanwhile
        computed_after = guard.attempt is not flight.attempt
        *values, applied = flight.told.tolist()
        reduced = guard.probes.unpack(values, flight.nominal, None)
        if not applied:
            self._take_back(flight, reduced, computed_after=computed_after)
            return False
        observation, verdict = guard.judge(flight.step, reduced, lr=flight.lr)
        late = verdict.action is not Action.APPLY
        if computed_after and (late or reduced.is_request):
            # First of all: RNG state and buffers must be those of the landed step before they are
            # saved or restored.
            self._drop(flight.step.number + 1)
        self._confirm(flight, reduced)
        if late:
            self._too_late(flight.step, observation, verdict)
        else:
            guard.verdicts.noted(flight.step, verdict)
            guard.applied()
        guard.heed(reduced)
        if late or reduced.is_request:
            return False
        guard.keep()
        return True

    def _confirm(self, flight: PendingStep, reduced: ReducedStep) -> None:
        """The books of an applied step, as far as the next one did not need them."""
        guard, step = self._guard, flight.step
        guard.checks.advance_schedule()
        step.applied = True
        guard.tokens += reduced.tokens
        guard.account.add(step, reduced, seconds=flight.seconds, guarding=flight.guarding)

    def _take_back(
        self, flight: PendingStep, reduced: ReducedStep, *, computed_after: bool
    ) -> None:
        """The update was left out: back to where its step began, which is formed again."""
        guard = self._guard
        if computed_after:
            self._drop(flight.step.number)
            guard.attempt, self._spare = self._spare, guard.attempt
        self._first = reduced, guard.probes.own
        self._drop(flight.step.number)
        guard.step = flight.step.number - 1
        guard.ledger.restore(flight.position)
        if guard.updates is not None:
            guard.updates.square = flight.square
        if reduced.incomplete:
            guard.end_incomplete()

    def _drop(self, number: int) -> None:
        """What was computed last does not count; step `number` comes next."""
        guard = self._guard
        guard.attempt.undo()
        guard.gate.leave_out()
        guard.probes.forget()
        self._dropped = number

    def _too_late(self, step: Step, observation: Observation, verdict: Verdict) -> None:
        """An update was applied that the controller rejects: the ceilings were wrong. Go back to
        before it.
        """
        guard = self._guard
        guard.verdicts.noted(step, verdict)
        window = verdict.window or (observation.first, observation.last)
        onset, reason = (
            verdict.onset or observation.step,
            f"applied before it was judged: {verdict.reason}",
        )
        over = guard.over_share(
            guard.timelines.span(window=window, onset=onset, reason=reason, verdict=verdict)
        )
        if over:
            guard.end(Phase.HALTED, f"{reason}; but {over}", onset=onset)
        elif not guard.timelines.roll_back(
            window=window, onset=onset, reason=reason, verdict=verdict
        ):
            guard.end(Phase.HALTED, reason, onset=onset)

    # -- the same step again -----------------------------------------------------------------------

    def command(self) -> tuple[int, float] | None:
        """On rank 0: the command that came with the first time, which has not been carried out."""
        if self._first is None:
            return None
        first = self._first[0]
        return (first.command_kind, first.command_value) if self._guard.rank == 0 else (0, 0.0)

    def first_numbers(self, again: ReducedStep) -> ReducedStep:
        """The numbers that a step which was formed again is judged by."""
        if self._first is None:
            return again
        guard = self._guard
        (first, own), self._first = self._first, None
        if _same(first, again, tolerance(guard.probes.device)):
            return again
        guard.probes.own = own
        return replace(
            first, stop=again.stop, incomplete=again.incomplete, step_times=again.step_times
        )

    def saw(self, signals: Mapping[str, float]) -> None:
        """A step with these signals has been judged."""
        self._signals = tuple(signals)


def _same(a: ReducedStep, b: ReducedStep, relative: float) -> bool:
    ours, theirs = a.signals(), b.signals()
    if ours.keys() != theirs.keys() or (a.nonfinite_loss, a.nonfinite_grad) != (
        b.nonfinite_loss,
        b.nonfinite_grad,
    ):
        return False
    return all(
        math.isclose(x, theirs[name], rel_tol=relative)
        or (math.isnan(x) and math.isnan(theirs[name]))
        for name, x in ours.items()
    )
