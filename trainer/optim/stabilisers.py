"""Optional means against instability: ZClip, StableAdamW's update clipping, QK-clip.

Each is a pure function of the training state and the batch, or has a state that travels with
snapshots, so that a rollback is as exact with them as without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from guardrail.torch.measure.reduction import copies, local
from trainer.model.attention import Attention

ROUNDING = 1e-5  # of an RMS that is 1 by its formula, as that of every first step


class ZClip:
    """ZClip (Kumar et al. 2025): cut a gradient norm that stands far above the running mean of the
    earlier ones.

    Called with the norm of an update that will be applied, it gives the largest norm that update
    may have, and learns the norm that is left. z = (norm - mean) / std; where z > z_limit, the norm
    becomes mean + z_limit^2 std / z. A norm that is not finite is not learnt (the published code is
    disabled by one).

    Args:
        z_limit: score from which on a norm is cut (published: 2.5).
        clip: largest norm in any case; 0: none.
    """

    WARMUP = 25  # norms behind the first mean and variance
    KEEP = 0.97  # of mean and variance at each update

    def __init__(self, *, z_limit: float, clip: float) -> None:
        self.z_limit, self.clip = z_limit, clip
        self.mean = self.variance = 0.0
        self.first: list[float] = []

    def __call__(self, norm: float) -> float:
        fixed = self.clip or math.inf
        if not math.isfinite(norm):
            return fixed
        if len(self.first) < self.WARMUP:
            self.first.append(norm)
            if len(self.first) == self.WARMUP:
                self.mean = sum(self.first) / self.WARMUP
                self.variance = sum((x - self.mean) ** 2 for x in self.first) / self.WARMUP
            return fixed
        deviation = math.sqrt(self.variance)
        score = (norm - self.mean) / (deviation + 1e-6)
        limit = (
            self.mean + self.z_limit**2 * deviation / score if score > self.z_limit else math.inf
        )
        left = min(norm, limit)
        self.mean = self.KEEP * self.mean + (1 - self.KEEP) * left
        self.variance = self.KEEP * self.variance + (1 - self.KEEP) * (left - self.mean) ** 2
        return min(limit, fixed)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "first": list(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.variance = float(state["mean"]), float(state["variance"])
        self.first = [float(norm) for norm in state["first"]]


class UpdateClipping:
    """StableAdamW (Wortsman et al. 2023): a tensor's learning rate over max(1, RMS), RMS^2 =
    mean(g^2 / max(v, eps^2)).

    v is the bias-corrected second moment with the present gradient in it. Hung around the step of a
    torch AdamW, fused or not: tensors with RMS <= 1 get AdamW's own bits.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._before: list[tuple[Tensor, Tensor, float]] = []
        optimizer.register_step_pre_hook(self._measure)
        optimizer.register_step_post_hook(self._shorten)

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer, *_arguments: Any) -> None:
        self._before = []  # what a step that raised has left
        trained = [
            (p, group)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not trained:
            return
        sharded = any(isinstance(parameter, DTensor) for parameter, _ in trained)
        world = dist.get_world_size() if sharded else 1
        sums = torch.stack(
            [
                self._ratio_sum(optimizer, p, group) / (copies(p, world) if sharded else 1)
                for p, group in trained
            ]
        )
        if world > 1:
            dist.all_reduce(sums)
        for (parameter, _group), total in zip(trained, sums.tolist(), strict=True):
            rms = math.sqrt(total / parameter.numel())
            if rms > 1 + ROUNDING:
                here = local(parameter).detach()
                self._before.append((here, here.clone(), 1 / rms))

    @staticmethod
    def _ratio_sum(optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """This rank's part of the sum of g^2 / v."""
        assert parameter.grad is not None
        square = local(parameter.grad).float() ** 2
        beta2: float = group["betas"][1]
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        step = int(state["step"]) + 1 if state else 1
        second = (1 - beta2) * square + (beta2 * local(state["exp_avg_sq"]) if state else 0.0)
        return (square / (second / (1 - beta2**step)).clamp(min=group["eps"] ** 2)).sum()

    @torch.no_grad()
    def _shorten(self, *_: Any) -> None:
        for now, before, share in self._before:
            now.copy_(before.lerp(now, share))
        self._before = []


class QKClip:
    """QK-clip (Kimi K2): after a step, heads whose largest score passed the limit get smaller
    queries and keys.

    Queries and keys of a head take sqrt(limit / score) each; with keys shared by several heads its
    queries take it all. The scores are those of the training batch that was just applied, over all
    ranks: one more all-reduce a step, of layers x heads numbers.

    Args:
        model: unwrapped; holds `Attention` modules.
        optimizer: the last one to step.
        limit: largest score (published: 100).
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, limit: float) -> None:
        self.limit = limit
        self.attentions = [module for module in model.modules() if isinstance(module, Attention)]
        device = local(next(model.parameters())).device
        for attention in self.attentions:
            attention.peaks_H = torch.zeros(attention.heads, device=device)
        optimizer.register_step_post_hook(self._clip)

    def begin(self) -> None:
        """A new attempt: what a batch showed that was left out is forgotten."""
        for attention in self.attentions:
            assert attention.peaks_H is not None
            attention.peaks_H.zero_()

    def peaks(self) -> list[Tensor]:
        """What the attempt has shown so far, a copy [H] for each layer."""
        return [
            attention.peaks_H.clone()
            for attention in self.attentions
            if attention.peaks_H is not None
        ]

    def put_back(self, peaks: list[Tensor]) -> None:
        """What `peaks` gave: a batch that was run in between has shown nothing."""
        for attention, peaks_H in zip(self.attentions, peaks, strict=True):
            assert attention.peaks_H is not None
            attention.peaks_H.copy_(peaks_H)

    @torch.no_grad()
    def _clip(self, *_: Any) -> None:
        peaks_LH = torch.stack([a.peaks_H for a in self.attentions if a.peaks_H is not None])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(peaks_LH, dist.ReduceOp.MAX)
        shares_LH = (self.limit / peaks_LH).clamp(max=1.0)
        for index in (shares_LH < 1).any(dim=1).nonzero().flatten().tolist():
            _shrink(self.attentions[index], shares_LH[index])


def _shrink(attention: Attention, share_H: Tensor) -> None:
    shared = attention.groups != attention.heads
    factor_H = share_H if shared else share_H.sqrt()
    for parameter, first in attention.query_key_rows(keys=not shared):
        rows = torch.ones(parameter.shape[0], device=share_H.device)
        rows[first : first + len(share_H) * attention.head_width] = factor_H.repeat_interleave(
            attention.head_width
        )
        scale: Tensor = rows.reshape(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            scale = distribute_tensor(
                scale, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
            )
        parameter.mul_(scale)
