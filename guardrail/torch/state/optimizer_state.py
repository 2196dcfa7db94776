"""What an optimizer keeps for each parameter: tensors and numbers, such as Adam's moments and
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guardrail.rundir.manifest import OPTIM
from guardrail.rundir.safetensors_header import Shape
from guardrail.torch.state import foreach, json_codec

# A parameter, the optimizer that trains it, and its group there.
Trained = tuple[nn.Parameter, Optimizer, dict[str, Any]]


def owner_of(name: str) -> str:
    """Return the name of the parameter that an optimizer tensor "optim/FQN/KEY" belongs to."""
    return name.removeprefix(OPTIM).rpartition("/")[0]


def collect_numbers(trained: Mapping[str, Trained]) -> dict[str, Any]:
    """Return the optimizer state that is not a tensor, and which tensors are on the host.

    Adam keeps its step there while its parameters are on a GPU.
    """
    numbers: dict[str, Any] = {}
    on_host: set[str] = set()
    for name, (parameter, optimizer, _) in trained.items():
        if parameter not in optimizer.state:
            continue
        own: dict[str, Any] = {}
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                own[key] = json_codec.encode(value, f"the optimizer state of {name}: {key}")
            elif value.device != parameter.device:
                on_host.add(key)
        if own:
            numbers[name] = own
    return {"numbers": numbers, "on_host": sorted(on_host)}


def match_saved_keys(
    trained: Mapping[str, Trained],
    found: Mapping[str, tuple[torch.dtype, Shape]],
    scalars: Mapping[str, Any],
) -> None:
    """Give each parameter's optimizer state exactly the keys that were saved."""
    saved: dict[str, dict[str, tuple[torch.dtype, Shape]]] = {}
    for name, kind in found.items():
        if name.startswith(OPTIM):
            owner, _, key = name.removeprefix(OPTIM).rpartition("/")
            saved.setdefault(owner, {})[key] = kind
    on_host = scalars["state"]["on_host"]
    for name, (parameter, optimizer, group) in trained.items():
        present = optimizer.state.pop(parameter, {})
        matching = {}
        for key, (dtype, shape) in saved.get(name, {}).items():
            live = present.get(key)
            if not isinstance(live, Tensor):
                live = _create(parameter, group, key, dtype, shape, on_host=key in on_host)
            matching[key] = live
        if matching or name in scalars["state"]["numbers"]:
            optimizer.state[parameter] = matching


def _create(
    parameter: nn.Parameter,
    group: dict[str, Any],
    key: str,
    dtype: torch.dtype,
    shape: Shape,
    *,
    on_host: bool,
) -> Tensor:
    """Return an optimizer tensor as the optimizer would have made it.

    It is small, or has the shape and sharding of the parameter.
    """
    host = torch.device("cpu")
    if key == "step":
        # torch.optim keeps it on the host unless the step itself runs on the device.
        is_on_device = group.get("fused") or group.get("capturable")
        return torch.empty(shape, dtype=dtype, device=parameter.device if is_on_device else host)
    if on_host:
        return torch.empty(shape, dtype=dtype, device=host)
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def keeps_tensors(optimizer: Optimizer) -> bool | None:
    """Return whether the optimizer keeps tensors for a parameter; None: unknown.

    If it has none yet, a copy of it takes one step on a new parameter. The copy shares nothing that
    a step changes.
    """
    if _has_tensors(optimizer.state):
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
    except Exception:
        # The optimizer may be of any kind, and the parameter is not one that it was made for.
        return None
    return _has_tensors(twin.state)


def _has_tensors(state: Mapping[Any, Mapping[str, Any]]) -> bool:
    for values in state.values():
        if any(isinstance(value, Tensor) for value in values.values()):
            return True
    return False
