"""Adafactor (Shazeer & Stern 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.optim.base import OptimizerSpec, OptimSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Adafactor(OptimizerSpec):
    """Keeps sums over rows and columns instead of a second moment per parameter."""

    name = "adafactor"
    help = "factored second moments (Shazeer & Stern 2018)"
    moments = 0  # one number per row and column of a matrix, which is little
    works_sharded: ClassVar[bool] = False
    uses_betas: ClassVar[bool] = False
    lr_is_relative: ClassVar[bool] = True

    def build(self, model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
        import torch

        from trainer.optim.parameter_groups import decay_groups, trained_parameters

        groups = decay_groups(trained_parameters(model), settings.weight_decay)
        # torch has no fused kernel for it.
        foreach = settings.implementation != "loop"
        return [torch.optim.Adafactor(groups, lr=settings.lr, foreach=foreach)]
