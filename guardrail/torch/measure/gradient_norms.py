"""Norms and names of parameters and gradients, sharded or not."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from guardrail.torch.state import foreach

_HALVES = (torch.float16, torch.bfloat16)
_NUMBERED_BLOCK = re.compile(r"(.*?\.\d+)\.")


def to_local(tensor: Tensor) -> Tensor:
    """Return the local part of a parameter or gradient, which is all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_replicas(parameter: Tensor, world: int) -> int:
    """Return how many of `world` ranks hold the same shard.

    Squares divided by it and summed over all ranks count each element once.
    """
    if not isinstance(parameter, DTensor):
        return world
    shards = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        if not placement.is_replicate():
            shards *= size
    return world // shards


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of every nn.Embedding; with tied weights this is the output matrix too."""
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            weight = module.get_parameter("weight")
            weights[id(weight)] = weight
    return list(weights.values())


def block_name(parameter: str) -> str:
    """Return the block of the model that a parameter belongs to.

    "layers.3" of "layers.3.attention.q.weight"; else the module of the parameter.
    """
    numbered = _NUMBERED_BLOCK.match(parameter)
    if numbered is not None:
        return numbered[1]
    return parameter.rpartition(".")[0] or parameter


def compute_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor, 0-d, in fp32 or more.

    The norm of finite fp16 numbers is often too large for fp16.
    """
    if any(tensor.dtype in _HALVES for tensor in tensors):
        return foreach.l2_norms(tensors, torch.float32)
    return foreach.l2_norms(tensors)


def compute_norm(tensor: Tensor) -> Tensor:
    """Return what `compute_norms` gives for one tensor, without building lists."""
    dtype = torch.float32 if tensor.dtype in _HALVES else None
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm
