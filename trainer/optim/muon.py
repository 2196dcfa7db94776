"""Muon (Jordan 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.optim.adamw import build_adam
from trainer.optim.base import OptimizerSpec, OptimSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Muon(OptimizerSpec):
    """Muon for the matrices inside the blocks, AdamW for the rest.

    Muon's learning rate is scaled so that its updates have AdamW's RMS (Liu et al. 2025). One
    learning rate and one weight decay therefore fit both.
    """

    name = "muon"
    help = (
        "orthogonalised momentum for the matrices inside the blocks (Jordan 2024), AdamW for the "
        "rest"
    )
    moments = 2  # one for the matrices, AdamW's two for the rest

    def build(self, model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
        import torch
        from torch.distributed.tensor import DTensor

        from trainer.optim.parameter_groups import (
            decay_groups,
            hidden_matrices,
            trained_parameters,
        )
        from trainer.optim.sharded_muon import ShardedMuon

        matrices = hidden_matrices(model)
        is_sharded = any(isinstance(matrix, DTensor) for matrix in matrices)
        kind = ShardedMuon if is_sharded else torch.optim.Muon
        muon = kind(
            matrices,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        chosen = {id(matrix) for matrix in matrices}
        rest = [p for p in trained_parameters(model) if id(p) not in chosen]
        groups = decay_groups(rest, settings.weight_decay)
        if not groups:
            return [muon]
        return [muon, build_adam(torch.optim.AdamW, groups, settings)]
