"""What DDP, torch.compile, activation checkpointing and Accelerate put around a model, an optimizer
or a name.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from guardrail.torch.state import foreach


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module inside of DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
            continue
        inner = foreach.compiled_module(model)
        if inner is None:
            return model
        model = inner


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
    for prefix in (foreach.COMPILE_PREFIX, foreach.CHECKPOINT_PREFIX):
        name = name.replace(prefix, "")
    return name
