"""Kinds of training state that could not be restored exactly, refused before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from guardrail.core.errors import UsageError


def refuse_other_sharding(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise UsageError for FSDP1 and ZeroRedundancyOptimizer."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UsageError(
                "the model is wrapped in FullyShardedDataParallel (FSDP1), which is not supported. "
                "Use fully_shard (FSDP2)."
            )
    for optimizer in optimizers:
        if "ZeroRedundancyOptimizer" in {kind.__name__ for kind in type(optimizer).__mro__}:
            raise UsageError(
                "ZeroRedundancyOptimizer hides which rank holds which state. "
                "Use fully_shard (FSDP2)."
            )


def refuse_expanded_buffers(buffers: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UsageError for a buffer whose elements share memory."""
    for name, buffer in buffers:
        sizes = zip(buffer.shape, buffer.stride(), strict=True)
        if any(stride == 0 and size > 1 for size, stride in sizes):
            raise UsageError(
                f"buffer {name} is an expanded view, which cannot be restored in place. clone() it."
            )
