"""What an optimizer keeps beside each parameter: tensors and numbers of its own, such as Adam's
moments and steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guardrail.rundir.manifest import OPTIM, Shape
from guardrail.torch.state import foreach
from guardrail.torch.state import json_codec as plain

# A parameter, the optimizer that trains it, and its group there.
Trained = tuple[nn.Parameter, Optimizer, dict[str, Any]]


def scalars(trained: Mapping[str, Trained]) -> dict[str, Any]:
    """Optimizer state that is no tensor, and which tensors stay on the host beside a device (Adam's
    steps).
    """
    numbers: dict[str, Any] = {}
    on_host: set[str] = set()
    for name, (parameter, optimizer, _) in trained.items():
        held = {}
        for key, value in (
            optimizer.state[parameter] if parameter in optimizer.state else {}
        ).items():
            if not isinstance(value, Tensor):
                held[key] = plain.encode(value, f"the optimizer state of {name}: {key}")
            elif value.device != parameter.device:
                on_host.add(key)
        if held:
            numbers[name] = held
    return {"numbers": numbers, "on_host": sorted(on_host)}


def reshape(
    trained: Mapping[str, Trained],
    found: Mapping[str, tuple[torch.dtype, Shape]],
    scalars: Mapping[str, Any],
) -> None:
    """Give each parameter's state exactly the keys that were saved."""
    saved: dict[str, dict[str, tuple[torch.dtype, Shape]]] = {}
    for name, kind in found.items():
        if name.startswith(OPTIM):
            owner, _, key = name.removeprefix(OPTIM).rpartition("/")
            saved.setdefault(owner, {})[key] = kind
    on_host = scalars["state"]["on_host"]
    for name, (parameter, optimizer, group) in trained.items():
        kept = optimizer.state.pop(parameter, {})
        fresh = {}
        for key, (dtype, shape) in saved.get(name, {}).items():
            live = kept.get(key)
            if not isinstance(live, Tensor):
                live = _created(parameter, group, key, dtype, shape, on_host=key in on_host)
            fresh[key] = live
        if fresh or name in scalars["state"]["numbers"]:
            optimizer.state[parameter] = fresh


def _created(
    parameter: nn.Parameter,
    group: dict[str, Any],
    key: str,
    dtype: torch.dtype,
    shape: Shape,
    *,
    on_host: bool,
) -> Tensor:
    """An optimizer tensor as the optimizer would have made it: shaped and sharded like the
    parameter, or small.
    """
    device = torch.device("cpu") if on_host else parameter.device
    if key == "step":  # torch.optim keeps it on the host unless the step itself runs on the device
        device = (
            parameter.device
            if group.get("fused") or group.get("capturable")
            else torch.device("cpu")
        )
    elif shape == tuple(parameter.shape) and not on_host:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def keeps_tensors(optimizer: Optimizer) -> bool | None:
    """Tried with one step of a twin on a parameter of its own, which shares nothing that a step
    changes.
    """
    if any(
        isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values()
    ):
        return True
    probe = nn.Parameter(torch.ones(2, 2))
    probe.grad = torch.ones(2, 2)
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.state = type(optimizer.state)(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [probe]}]
    foreach.drop_step_hooks(twin)
    try:
        # Not twin.step(): a scheduler has put a wrapper there that is bound to the real optimizer.
        type(optimizer).step(twin)
    # anybody's optimizer, on a parameter that it was not made for: then nobody knows
    except Exception:
        return None
    return any(
        isinstance(value, Tensor) for state in twin.state.values() for value in state.values()
    )
