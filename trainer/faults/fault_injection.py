"""Faults that are injected on purpose, for tests and demonstrations: `[[faults]]`.

The loop calls one method at each place where a fault can act:

    faults.choose_for_step(step=..., positions=...)   # once per attempt
    faults.damage_state(model, optimizers)            # between two steps; never in a replay
    micro_batches = faults.damage_data(micro_batches, ...)
    for micro, (tokens, labels) in enumerate(...):
        labels = faults.damage_labels(micro, labels)  # before the forward pass; may end the process
        logits = faults.damage_logits(micro, logits)
        loss = faults.damage_loss(micro, model, loss, scale=scale)   # before its backward pass
    faults.damage_gradients(model)                    # reduced gradients, before they are measured

A loop without faults (`Faults` is false then) skips these calls. A fault by position acts on batches
that use one of its positions, so quarantined positions never cause it again. A fault by step acts on
each attempt at that step. A fault by both acts if both hold.
"""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guardrail.torch.measure.gradient_norms import to_local
from trainer.config.sections import FaultSection
from trainer.data.loader import MicroBatch
from trainer.faults.damage import damage_rows, damage_state, noise_gradient
from trainer.objectives.loss import IGNORED
from trainer.parallel.data_parallel import unwrap_model

ENDINGS = ("hang", "exit", "raise")
TEXT = ("noise_tokens", "repeat_tokens", "shuffle_labels")
STATE = ("scale_weights", "scale_row", "flip_weight", "flip_moment", "zero_moments")


class StagedFault(RuntimeError):
    """Raised by a fault of kind "raise": an unhandled error, like a bug in a user's loop."""


class Faults:
    """The faults of this rank. False if there are none.

    Args:
        sections: [[faults]] of the configuration.
        rank: of this process.
    """

    def __init__(self, sections: Sequence[FaultSection], *, rank: int) -> None:
        self._rank = rank
        self._sections = [section for section in sections if section.rank in (-1, rank)]
        self._left = [section.times for section in self._sections]
        # Step -> how often each fault could still act before the last attempt at it.
        self._left_at: dict[int, list[int]] = {}
        self._now: list[FaultSection] = []
        self._micro = 0  # micro-batch whose forward pass is next
        # Factor on the learning rate of the present attempt; replays do not change it.
        self._rate = 1.0

    def __bool__(self) -> bool:
        return bool(self._sections)

    def choose_for_step(
        self, *, step: int, positions: Sequence[int], repeated: bool = False
    ) -> None:
        """Choose the faults of an attempt.

        Args:
            step: the number that the update would get.
            positions: of the global batch in the sample order, ascending, without quarantined ones.
            repeated: whether an attempt at this step was dropped without a decision. That attempt
                and those after it then count as not made, except for faults of the state: nothing
                was rolled back.
        """
        self._now = []
        if repeated:
            for index, before in enumerate(self._left_at[step]):
                if self._sections[index].kind not in STATE:
                    self._left[index] = before
        neighbours = (step - 1, step + 1)
        self._left_at = {at: left for at, left in self._left_at.items() if at in neighbours}
        self._left_at[step] = list(self._left)
        for index, section in enumerate(self._sections):
            if repeated and section.kind in STATE:
                continue
            if self._left[index] and _acts_on(section, step, positions):
                self._left[index] -= 1
                self._now.append(section)
        self._rate = math.prod(fault.value for fault in self._now if fault.kind == "scale_lr")

    def choose_for_replay(self, *, step: int, positions: Sequence[int]) -> None:
        """Choose the faults of a replay, which does not count as one of their `times`.

        A fault by position is in the data again. A fault by step acts again at its step. A fault
        that has acted `times` times does not, like hardware that fails once. No process hangs or
        ends in a replay, and the state is not damaged.
        """
        self._now = []
        for section, left in zip(self._sections, self._left, strict=True):
            can_act = left and section.kind not in (*ENDINGS, *STATE)
            if can_act and _acts_on(section, step, positions):
                self._now.append(section)

    def attach(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Register the hooks of spike_embedding and scale_lr.

        scale_lr changes the rate during the step only: schedule, guard and journal see the rate
        that was meant.
        """
        kinds = {section.kind for section in self._sections}
        if "spike_embedding" in kinds:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.register_forward_hook(self._damage_embedding)
        if "scale_lr" in kinds:
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(
                    lambda hooked, *_: _scale_rates(hooked, self._rate)
                )
                optimizer.register_step_post_hook(
                    lambda hooked, *_: _scale_rates(hooked, 1 / self._rate)
                )

    def damage_state(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Damage weights or moments, before the forward pass of the present batch."""
        for fault in self._now:
            if fault.kind in STATE:
                damage_state(
                    fault.kind,
                    unwrap_model(model),
                    optimizers,
                    value=fault.value,
                    entry=fault.entry,
                )

    def damage_data(
        self,
        micro_batches: list[MicroBatch],
        positions: Sequence[Sequence[int]],
        *,
        vocabulary: int,
    ) -> list[MicroBatch]:
        """Return the micro-batches, with other text where a fault acts; the argument is unchanged.

        Args:
            positions: of the real rows of each micro-batch.
        """
        damaged = list(micro_batches)
        for fault in self._now:
            if fault.kind not in TEXT:
                continue
            for index, places in enumerate(positions):
                if fault.micro in (-1, index):
                    damaged[index] = damage_rows(
                        damaged[index],
                        fault.kind,
                        _rows_to_damage(fault, places),
                        vocabulary=vocabulary,
                    )
        return damaged

    def damage_labels(self, micro: int, labels: Tensor) -> Tensor:
        """Return the labels [B, T] of a micro-batch, or ignored ones; the argument is unchanged.

        Faults that stop or end the process act here.
        """
        self._micro = micro
        for fault in self._now:
            # Without `micro`, the process stops or ends before the first micro-batch.
            if micro == max(fault.micro, 0):
                _stop_process(fault, self._rank)
            if fault.kind == "ignore_labels" and fault.micro in (-1, micro):
                labels = torch.full_like(labels, IGNORED)
        return labels

    def _damage_embedding(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        for fault in self._now:
            if (
                fault.kind == "spike_embedding"
                and fault.micro in (-1, self._micro)
                and output.requires_grad
            ):
                output.register_hook(partial(operator.mul, fault.value))

    def damage_logits(self, micro: int, logits: Tensor) -> Tensor:
        """Return the logits of a micro-batch; garbage_grad replaces their gradient by noise."""
        for fault in self._now:
            if fault.kind == "garbage_grad" and fault.micro in (-1, micro):
                logits.register_hook(partial(noise_gradient, value=fault.value))
        return logits

    def damage_loss(
        self, micro: int, model: nn.Module, loss: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        """Return the loss of a micro-batch, damaged; faults of gradients act in its backward pass.

        Args:
            scale: factor on the loss before its backward pass (fp16).
        """
        for fault in self._now:
            if fault.micro not in (-1, micro):
                continue
            if fault.kind == "nan_loss":
                loss = loss * math.nan
            elif fault.kind == "spike_loss":
                loss = loss * fault.value
            elif fault.kind == "spike_grad":
                loss.register_hook(partial(operator.mul, fault.value))
            elif fault.kind == "inf_grad" or (fault.kind == "overflow" and scale > fault.value):
                loss = loss + _BadGradient.apply(
                    to_local(unwrap_model(model).root_weight), math.inf
                )
            elif fault.kind == "nan_grad":
                loss = loss + _BadGradient.apply(
                    to_local(unwrap_model(model).root_weight), math.nan
                )
        return loss

    def damage_gradients(self, model: nn.Module) -> None:
        """Make one entry of this rank's reduced gradients infinite; `micro` is not used."""
        if any(fault.kind == "inf_grad_reduced" for fault in self._now):
            for parameter in model.parameters():
                gradient = parameter.grad
                if gradient is None:
                    continue
                here = to_local(gradient)
                if here.numel():  # a rank may hold nothing of a small sharded parameter
                    here.view(-1)[0] = math.inf
                    return


def _acts_on(fault: FaultSection, step: int, positions: Sequence[int]) -> bool:
    if fault.step and not fault.step <= step < fault.step + fault.steps:
        return False
    if fault.step and fault.last <= fault.first:
        return True
    return any(fault.first <= position < fault.last for position in positions)


def _rows_to_damage(fault: FaultSection, positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return (row, position) of the rows to damage: those in [first, last), or all without it."""
    rows = list(enumerate(positions))
    if fault.last <= fault.first:
        return rows
    return [(row, at) for row, at in rows if fault.first <= at < fault.last]


def _scale_rates(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor


class _BadGradient(torch.autograd.Function):
    """Zero, whose gradient for the first entry of a weight is `value`: infinite or NaN.

    As part of the graph it acts where a broken kernel would: before any hook on the weight, and
    before the ranks are averaged. The weight is one outside the blocks (that of the last norm).
    With fsdp it is a complete plain leaf between forward and backward too, because the root's group
    stays gathered.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.value = value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        damaged = torch.zeros_like(weight)
        damaged.view(-1)[0] = ctx.value
        return damaged, None


def _stop_process(fault: FaultSection, rank: int) -> None:
    if fault.kind == "hang":
        # Threads and signal handlers continue, as while a collective waits for a lost rank.
        end = time.monotonic() + fault.value
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
    elif fault.kind == "exit":
        os._exit(int(fault.value))
    elif fault.kind == "raise":
        raise StagedFault(f"staged on rank {rank} by [[faults]]")
