"""QK-clip (Kimi K2): limits the largest attention score of each head."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from guardrail.torch.measure.gradient_norms import to_local
from trainer.model.attention import Attention


class QKClip:
    """After a step, scales down queries and keys of heads whose largest score passed the limit.

    Queries and keys of a head are scaled by sqrt(limit / score) each. Where several heads share
    keys, the queries alone are scaled, by limit / score. The scores are those of the training batch
    that was just applied, over all ranks: one more all-reduce per step, of layers x heads numbers.

    Args:
        model: unwrapped; holds `Attention` modules.
        optimizer: the last one to step.
        limit: largest score (published: 100).
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, limit: float) -> None:
        self.limit = limit
        self.attentions = [module for module in model.modules() if isinstance(module, Attention)]
        device = to_local(next(model.parameters())).device
        for attention in self.attentions:
            attention.peaks_H = torch.zeros(attention.heads, device=device)
        optimizer.register_step_post_hook(self._clip)

    def forget_scores(self) -> None:
        """Forget the scores of the last attempt: its batch may have been skipped."""
        for attention in self.attentions:
            assert attention.peaks_H is not None
            attention.peaks_H.zero_()

    def save_scores(self) -> list[Tensor]:
        """Return the largest scores of the attempt so far, a copy [H] for each layer."""
        peaks = [attention.peaks_H for attention in self.attentions]
        return [peaks_H.clone() for peaks_H in peaks if peaks_H is not None]

    def restore_scores(self, peaks: list[Tensor]) -> None:
        """Restore what `peaks` returned, after a replay."""
        for attention, peaks_H in zip(self.attentions, peaks, strict=True):
            assert attention.peaks_H is not None
            attention.peaks_H.copy_(peaks_H)

    @torch.no_grad()
    def _clip(self, *_: Any) -> None:
        peaks_LH = torch.stack([a.peaks_H for a in self.attentions if a.peaks_H is not None])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(peaks_LH, dist.ReduceOp.MAX)
        shares_LH = (self.limit / peaks_LH).clamp(max=1.0)
        is_above_L = (shares_LH < 1).any(dim=1).tolist()
        for index, is_above in enumerate(is_above_L):
            if is_above:
                _scale_heads(self.attentions[index], shares_LH[index])


def _scale_heads(attention: Attention, share_H: Tensor) -> None:
    """Multiply the scores of each head by `share_H`, through its queries and keys."""
    is_shared = attention.groups != attention.heads
    factor_H = share_H
    if not is_shared:
        factor_H = share_H.sqrt()
    for parameter, first in attention.query_key_rows(keys=not is_shared):
        rows = torch.ones(parameter.shape[0], device=share_H.device)
        last = first + len(share_H) * attention.head_width
        rows[first:last] = factor_H.repeat_interleave(attention.head_width)
        scale: Tensor = rows.reshape(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            scale = distribute_tensor(scale, mesh, [Replicate()] * mesh.ndim)
        parameter.mul_(scale)
