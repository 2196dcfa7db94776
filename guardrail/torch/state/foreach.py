"""Private parts of torch that guardrail uses: multi-tensor kernels, and attributes without a public
name.

No other module of guardrail touches them, so a change in torch is mended here.
`tests/unit/torch/test_foreach.py` names each of them and fails when torch no longer has it.
torch.optim uses the `_foreach` kernels itself; they take one launch for many tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

# The key of a GradScaler's state dict that counts updates since the last overflow.
GROWTH_TRACKER = "_growth_tracker"
# What torch.compile and activation checkpointing put into the names of parameters and buffers.
COMPILE_PREFIX = "_orig_mod."
CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


def copy_tensors(
    targets: list[Tensor], sources: list[Tensor], *, non_blocking: bool = False
) -> None:
    """Copy each source into the target at the same index, in place."""
    torch._foreach_copy_(targets, sources, non_blocking)


def subtract_tensors(targets: list[Tensor], others: list[Tensor]) -> None:
    """Subtract from each target the tensor at the same index, in place."""
    torch._foreach_sub_(targets, others)


def multiply_tensors(tensors: list[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors by one factor, in place."""
    torch._foreach_mul_(tensors, factor)  # type: ignore[call-overload, unused-ignore]


def l2_norms(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the L2 norm of each tensor, 0-d, computed in `dtype` where one is given."""
    if dtype is None:
        return list(torch._foreach_norm(tensors))
    return list(torch._foreach_norm(tensors, 2, dtype))


def change_count(tensor: Tensor) -> int:
    """Return how many in-place changes of the tensor autograd has counted."""
    return tensor._version


def is_running_norm(module: nn.Module) -> bool:
    """Return whether a layer may keep running statistics, which change without being counted."""
    return isinstance(module, _NormBase)


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters of the module itself, not of its children, by name."""
    return module._parameters


def own_buffers(module: nn.Module) -> Mapping[str, Tensor | None]:
    """Return the buffers of the module itself, not of its children, by name."""
    return module._buffers


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Return whether the module's own buffer of this name is part of its state dict."""
    return buffer not in module._non_persistent_buffers_set


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile has wrapped in `model`; None if it has not."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def stored_shard(tensor: DTensor) -> Tensor:
    """Return the storage of this rank's shard, outside of autograd's graph."""
    return tensor._local_tensor


def shard_place(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (offsets, sizes) of this rank's shard, as torch.distributed.checkpoint reads them."""
    chunk = tensor.__create_chunk_list__()[0]
    return tuple(chunk.offsets), tuple(chunk.sizes)


def drop_step_hooks(optimizer: Optimizer) -> None:
    """Replace the step hooks of the optimizer by new empty dicts."""
    optimizer._optimizer_step_pre_hooks = {}
    optimizer._optimizer_step_post_hooks = {}


def reads_found_inf(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's step reads `found_inf`, as torch's fused optimizers do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def scaler_tensors(scaler: Any) -> list[Tensor]:
    """Return scale and growth tracker of a torch.amp.GradScaler, both 0-d.

    []: it has not scaled yet, or is of another class, and has no tensors.
    """
    tensors = [getattr(scaler, name, None) for name in ("_scale", GROWTH_TRACKER)]
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if len(found) != len(tensors):
        return []
    return found


def scaler_factors(scaler: Any) -> dict[str, Any]:
    """Return how a GradScaler changes its scale, as in its state dict; reads no tensor."""
    return {
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
    }


def step_unless(optimizer: Any, skip: Tensor) -> None:
    """Step the optimizer, which changes nothing where `skip` is 1 on the device.

    The contract of torch's GradScaler with optimizers for which `reads_found_inf` holds.
    """
    optimizer.found_inf = skip
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
