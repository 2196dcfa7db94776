"""What DDP, torch.compile, activation checkpointing and Accelerate put around a model, an optimizer
or a name.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WRAPPED = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile, activation checkpointing


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module inside of DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def unwrap(item: Any, attribute: str) -> Any:
    """What Accelerate's AcceleratedOptimizer and AcceleratedScheduler hold."""
    return getattr(item, attribute) if accelerated(item) else item


def accelerated(item: Any) -> bool:
    """Whether Accelerate's `prepare` made it."""
    return type(item).__name__.startswith("Accelerated") and type(item).__module__.startswith(
        "accelerate."
    )


def plain_name(name: str) -> str:
    """The name of a parameter or buffer as the model has it that nothing is put around."""
    for wrapped in _WRAPPED:
        name = name.replace(wrapped, "")
    return name
