"""Finds and removes the wrappers of DDP, torch.compile, activation checkpointing and Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from guardrail.torch.state import foreach


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside of DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
            continue
        inner = foreach.compiled_module(model)
        if inner is None:
            return model
        model = inner


def combines_gradients(model: nn.Module) -> bool:
    """Return whether DDP, FSDP2 or tensor parallelism combines the gradients of the ranks."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def unwrap(item: Any, attribute: str) -> Any:
    """Return the object inside of Accelerate's AcceleratedOptimizer or AcceleratedScheduler."""
    if is_accelerated(item):
        return getattr(item, attribute)
    return item


def is_accelerated(item: Any) -> bool:
    """Return whether Accelerate's `prepare` made an object."""
    kind = type(item)
    return kind.__name__.startswith("Accelerated") and kind.__module__.startswith("accelerate.")


def plain_name(name: str) -> str:
    """Return the name that a parameter or buffer has in the unwrapped model."""
    for prefix in (foreach.COMPILE_PREFIX, foreach.CHECKPOINT_PREFIX):
        name = name.replace(prefix, "")
    return name
