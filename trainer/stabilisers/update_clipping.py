"""StableAdamW's update clipping (Wortsman et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from guardrail.torch.measure.gradient_norms import count_replicas, to_local

# An RMS that is 1 by its formula, as in every first step, differs from 1 by rounding.
ROUNDING = 1e-5


class UpdateClipping:
    """Divides the learning rate of a tensor by max(1, RMS), RMS^2 = mean(g^2 / max(v, eps^2)).

    v is the bias-corrected second moment that includes the present gradient. It works through hooks
    around the step of a torch AdamW, fused or not. A tensor with RMS <= 1 gets exactly AdamW's
    update.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # (parameter, its values before the step, share of the step to keep)
        self._before: list[tuple[Tensor, Tensor, float]] = []
        optimizer.register_step_pre_hook(self._measure)
        optimizer.register_step_post_hook(self._shorten)

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer, *_arguments: Any) -> None:
        """Note the tensors whose update will be shortened. Collective if parameters are sharded."""
        self._before = []  # a step that raised may have left entries
        trained: list[tuple[nn.Parameter, dict[str, Any]]] = []
        for group in optimizer.param_groups:
            trained += [(p, group) for p in group["params"] if p.grad is not None]
        if not trained:
            return
        world = 1
        is_sharded = any(isinstance(parameter, DTensor) for parameter, _ in trained)
        if is_sharded:
            world = dist.get_world_size()
        parts = []
        steps = _read_steps(optimizer, [parameter for parameter, _ in trained])
        for (parameter, group), step in zip(trained, steps, strict=True):
            part = _sum_ratios(optimizer, parameter, group, step=step)
            if is_sharded:
                part = part / count_replicas(parameter, world)
            parts.append(part)
        sums = torch.stack(parts)
        if world > 1:
            dist.all_reduce(sums)
        for (parameter, _group), total in zip(trained, sums.tolist(), strict=True):
            rms = math.sqrt(total / parameter.numel())
            if rms > 1 + ROUNDING:
                here = to_local(parameter).detach()
                self._before.append((here, here.clone(), 1 / rms))

    @torch.no_grad()
    def _shorten(self, *_: Any) -> None:
        for now, before, share in self._before:
            now.copy_(before.lerp(now, share))
        self._before = []


def _read_steps(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[int]:
    """Return the number of the coming update of each parameter; waits for the device once.

    A fused AdamW keeps one count a parameter on the device.
    """
    counts: dict[int, Tensor] = {}
    for index, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter)
        if state:
            counts[index] = to_local(state["step"])
    steps = [1] * len(parameters)
    if counts:
        applied = torch.stack(list(counts.values())).tolist()
        for index, count in zip(counts, applied, strict=True):
            steps[index] = int(count) + 1
    return steps


def _sum_ratios(
    optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any], *, step: int
) -> Tensor:
    """Return this rank's part of the sum of g^2 / max(v, eps^2) at the update of number `step`."""
    assert parameter.grad is not None
    square = to_local(parameter.grad).float() ** 2
    beta2: float = group["betas"][1]
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    second = (1 - beta2) * square
    if state:
        second = second + beta2 * to_local(state["exp_avg_sq"])
    return (square / (second / (1 - beta2**step)).clamp(min=group["eps"] ** 2)).sum()
