"""Faults staged on purpose, for tests and demonstrations: `[[faults]]` of the configuration.

The loop calls one hook at each place where a fault can strike:

    faults.batch(step=..., positions=...)            # once an attempt
    faults.state(model, optimizers)                  # weights and moments, between two steps; never in a replay
    micro_batches = faults.data(micro_batches, ...)  # rows of the stretch, before the forward pass
    for micro, (tokens, labels) in enumerate(...):
        labels = faults.labels(micro, labels)        # before the forward pass; hangs, exits and raises strike here
        logits = faults.logits(micro, logits)        # garbage is hung into the backward pass that follows
        loss = faults.loss(micro, model, loss, scale=scale)  # the 0-d loss, before its backward pass
    faults.gradients(model)                          # reduced gradients, before the probes measure them

A loop whose `Faults` is empty (false) skips them. A fault by position strikes the batches that use
a position of its stretch, so a quarantined stretch never strikes again; a fault by step strikes
each attempt at that step; one by both strikes where both are met.
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
    """Raised by a fault of kind "raise": an error nobody handles, as a bug in a user's loop would
    be.
    """


class Faults:
    """The faults that strike this rank.

    Args:
        sections: of the configuration.
        rank: of this process.
    """

    def __init__(self, sections: Sequence[FaultSection], *, rank: int) -> None:
        self._rank = rank
        self._sections = [section for section in sections if section.rank in (-1, rank)]
        self._left = [section.times for section in self._sections]
        # step -> what was left before the last attempts at it
        self._left_at: dict[int, list[int]] = {}
        self._now: list[FaultSection] = []
        self._micro = 0  # whose forward pass is next
        # factor on the learning rate of the attempt at hand, whatever is replayed meanwhile
        self._rate = 1.0

    def __bool__(self) -> bool:
        return bool(self._sections)

    def choose_for_step(
        self, *, step: int, positions: Sequence[int], repeated: bool = False
    ) -> None:
        """Choose what strikes this attempt.

        Args:
            step: the number that the update would get.
            positions: of the sample order that the global batch uses, ascending, quarantined ones
            not among them.
            repeated: an attempt at this step was dropped unjudged; it and those behind it have used
                nothing up. What strikes the state has struck it once, and nobody went back.
        """
        self._now = []
        if repeated:
            states = [section.kind in STATE for section in self._sections]
            before = self._left_at[step]
            self._left = [
                now if state else old
                for now, old, state in zip(self._left, before, states, strict=True)
            ]
        self._left_at = {
            at: left for at, left in self._left_at.items() if at in (step - 1, step + 1)
        }
        self._left_at[step] = list(self._left)
        for index, section in enumerate(self._sections):
            if repeated and section.kind in STATE:
                continue
            if self._left[index] and _meets(section, step, positions):
                self._left[index] -= 1
                self._now.append(section)
        self._rate = math.prod(fault.value for fault in self._now if fault.kind == "scale_lr")

    def choose_for_replay(self, *, step: int, positions: Sequence[int]) -> None:
        """Choose what strikes a replay, which uses no fault up.

        What is in the data (a fault by position) is in it again, and what is in the state (a fault
        by step) as long as the state is that of the step. A fault that has struck as often as its
        `times` says does not come again, as with hardware that fails once. Nothing hangs or ends a
        process a second time.
        """
        self._now = [
            section
            for section, left in zip(self._sections, self._left, strict=True)
            if left and section.kind not in (*ENDINGS, *STATE) and _meets(section, step, positions)
        ]

    def attach(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Let scale_lr raise the rate within a step alone: schedule, guard and journal see what was
        meant. Let spike_embedding reach what the embedding gives."""
        if any(s.kind == "spike_embedding" for s in self._sections):
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.register_forward_hook(self._embedded)
        for optimizer in optimizers if any(s.kind == "scale_lr" for s in self._sections) else []:
            optimizer.register_step_pre_hook(lambda hooked, *_: _scale_rates(hooked, self._rate))
            optimizer.register_step_post_hook(
                lambda hooked, *_: _scale_rates(hooked, 1 / self._rate)
            )

    def damage_state(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Strike weights or moments: the batch at hand is the first one that meets it."""
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
        """Micro-batches with other text where a fault says so; the argument is not written to.

        Args:
            positions: of the real rows of each micro-batch.
        """
        for fault in self._now:
            if fault.kind in TEXT:
                micro_batches = [
                    damage_rows(micro, fault.kind, _struck(fault, places), vocabulary=vocabulary)
                    if fault.micro in (-1, index)
                    else micro
                    for index, (micro, places) in enumerate(
                        zip(micro_batches, positions, strict=True)
                    )
                ]
        return micro_batches

    def damage_labels(self, micro: int, labels: Tensor) -> Tensor:
        """Labels [B, T] of a micro-batch, all ignored where the fault says so; the argument is not
        written to.
        """
        self._micro = micro
        for fault in self._now:
            # Without a micro-batch of its own, what ends or stops the process does so before the
            # first.
            if micro == max(fault.micro, 0):
                _interrupt(fault, self._rank)
            if fault.kind == "ignore_labels" and fault.micro in (-1, micro):
                labels = torch.full_like(labels, IGNORED)
        return labels

    def _embedded(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        for fault in self._now:
            if (
                fault.kind == "spike_embedding"
                and fault.micro in (-1, self._micro)
                and output.requires_grad
            ):
                output.register_hook(partial(operator.mul, fault.value))

    def damage_logits(self, micro: int, logits: Tensor) -> Tensor:
        """Logits of a micro-batch, unchanged; their gradient becomes garbage where the fault says
        so.
        """
        for fault in self._now:
            if fault.kind == "garbage_grad" and fault.micro in (-1, micro):
                logits.register_hook(partial(noise_gradient, value=fault.value))
        return logits

    def damage_loss(
        self, micro: int, model: nn.Module, loss: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        """The loss of a micro-batch, spoiled; gradient faults are hung into the backward pass that
        follows.

        Args:
            scale: that the loss will be multiplied by before its backward pass.
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
                loss = loss + _Spoiled.apply(to_local(unwrap_model(model).root_weight), math.inf)
            elif fault.kind == "nan_grad":
                loss = loss + _Spoiled.apply(to_local(unwrap_model(model).root_weight), math.nan)
        return loss

    def damage_gradients(self, model: nn.Module) -> None:
        """Spoil one entry of this rank's reduced gradients, as broken memory would. `micro` has no
        meaning here.
        """
        if any(fault.kind == "inf_grad_reduced" for fault in self._now):
            for parameter in model.parameters():
                gradient = parameter.grad
                if gradient is None:
                    continue
                here = to_local(gradient)
                if here.numel():  # a rank may hold nothing of a small sharded parameter
                    here.view(-1)[0] = math.inf
                    return


def _meets(fault: FaultSection, step: int, positions: Sequence[int]) -> bool:
    if fault.step and not fault.step <= step < fault.step + fault.steps:
        return False
    if fault.step and fault.last <= fault.first:
        return True
    return any(fault.first <= position < fault.last for position in positions)


def _struck(fault: FaultSection, positions: Sequence[int]) -> list[tuple[int, int]]:
    """(row, position) of a micro-batch that a fault of the text strikes: all rows without a
    stretch.
    """
    everywhere = fault.last <= fault.first
    return [
        (row, at)
        for row, at in enumerate(positions)
        if everywhere or fault.first <= at < fault.last
    ]


def _scale_rates(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor


class _Spoiled(torch.autograd.Function):
    """Zero, with an infinite gradient, or one of NaN, for the first entry of a weight.

    As part of the graph it spoils the gradient where a broken kernel would: before any hook on the
    weight sees it, and before the ranks are averaged. The weight is one outside of the blocks (the
    last norm's): between forward and backward it is a whole, plain leaf under fsdp as well, because
    the root's group stays gathered.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.value = value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        spoiled = torch.zeros_like(weight)
        spoiled.view(-1)[0] = ctx.value
        return spoiled, None


def _interrupt(fault: FaultSection, rank: int) -> None:
    if fault.kind == "hang":
        # Threads and signal handlers go on, as they do while a collective waits for a lost rank.
        end = time.monotonic() + fault.value
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
    elif fault.kind == "exit":
        os._exit(int(fault.value))
    elif fault.kind == "raise":
        raise StagedFault(f"staged on rank {rank} by [[faults]]")
