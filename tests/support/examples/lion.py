"""Example of an optimizer: Lion (Chen et al. 2023). Register it with one line in
`trainer.optim.registry.OPTIMIZERS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.optim.base import OptimizerSpec, OptimSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Lion(OptimizerSpec):
    """Steps by the sign of an average of gradients; `lr` should be 3 to 10 times below AdamW's."""

    name = "lion"
    help = "sign of an average of gradients (Chen et al. 2023)"
    moments = 1

    def build(self, model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
        import torch

        from trainer.optim.parameter_groups import decay_groups, trained_parameters

        class TorchLion(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: object = None) -> None:  # type: ignore[override]
                for group in self.param_groups:
                    beta1, beta2 = group["betas"]
                    for parameter in group["params"]:
                        if parameter.grad is None:
                            continue
                        state = self.state[parameter]
                        if not state:
                            state["average"] = torch.zeros_like(parameter)
                        average = state["average"]
                        direction = average.lerp(parameter.grad, 1 - beta1).sign()
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        parameter.sub_(direction * group["lr"])
                        average.lerp_(parameter.grad, 1 - beta2)

        groups = decay_groups(trained_parameters(model), settings.weight_decay)
        betas = (settings.beta1, settings.beta2)
        return [TorchLion(groups, {"lr": settings.lr, "betas": betas})]
