"""Gradient norms of this rank alone, from before the ranks reduce their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from guardrail.torch.measure.gradient_norms import compute_norm, to_local
from guardrail.torch.state import foreach

# Norms kept before they are added up. A long window of micro-batches gives many small tensors.
_KEPT_NORMS = 4096


class OwnGradientNorms:
    """Sums the norms of this rank's gradients during backward, before DDP or FSDP reduce them.

    A NaN or Inf in the sum names the rank that produced it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._norms: list[Tensor] = []  # fp32, 0-d
        self._hooks: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Register a hook on each parameter that takes part in the forward pass.

        Under FSDP2 these are the gathered parameters. They stay the same objects from their first
        gathering on, so each group is gathered once here, a collective. The forward pass does not
        register the hooks, because torch.compile would trace that.

        A hook keeps no reference to its gradient: autograd would copy a gradient that is referenced
        elsewhere instead of taking it over. The hook is short, because it runs once per parameter.
        """
        hooked: set[int] = set()
        for group, modules in _fsdp_groups(model):
            if group is not None:
                group.unshard()
            for parameter in _trained_parameters(modules):
                if id(parameter) not in hooked:
                    hooked.add(id(parameter))
                    self._hooks.append(parameter.register_hook(self._add))
            if group is not None:
                group.reshard()

    def _add(self, gradient: Tensor) -> None:
        # Summed later: one addition per gradient costs as much as reading the gradient.
        self._norms.append(compute_norm(to_local(gradient).detach()))
        if len(self._norms) >= _KEPT_NORMS:
            self._norms = [self.total()]

    def total(self) -> Tensor:
        """Return the sum of the norms so far, fp32, 0-d."""
        if not self._norms:
            return torch.zeros((), dtype=torch.float32, device=self._device)
        return torch.stack([norm.float() for norm in self._norms]).sum()

    def clear(self) -> None:
        """Start the next sum at zero."""
        self._norms = []

    def close(self) -> None:
        """Remove the hooks from the model. May be called again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _trained_parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of the modules themselves that require a gradient."""
    parameters: list[nn.Parameter] = []
    for module in modules:
        for parameter in foreach.own_parameters(module).values():
            if parameter is not None and parameter.requires_grad:
                parameters.append(parameter)
    return parameters


def _fsdp_groups(model: nn.Module) -> list[tuple[FSDPModule | None, list[nn.Module]]]:
    """Return each FSDP2 group with the modules that belong to it.

    A module belongs to its nearest group. Modules without a group come with None.
    """
    groups: dict[int, tuple[FSDPModule | None, list[nn.Module]]] = {}

    def visit(module: nn.Module, group: FSDPModule | None) -> None:
        if isinstance(module, FSDPModule):
            group = module
        groups.setdefault(id(group), (group, []))[1].append(module)
        for child in module.children():
            visit(child, group)

    visit(model, None)
    return list(groups.values())
