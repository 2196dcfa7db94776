"""Adam (Kingma & Ba 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.optim.adamw import build_adam
from trainer.optim.base import OptimizerSpec, OptimSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Adam(OptimizerSpec):
    """Adam; weight decay is added to the gradient."""

    name = "adam"
    help = "Adam (Kingma & Ba 2015); weight decay is added to the gradient"
    moments = 2
    works_with_model_parallel: ClassVar[bool] = True
    works_deferred: ClassVar[bool] = True

    def build(self, model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
        import torch

        from trainer.optim.parameter_groups import decay_groups, trained_parameters

        groups = decay_groups(trained_parameters(model), settings.weight_decay)
        return [build_adam(torch.optim.Adam, groups, settings)]
