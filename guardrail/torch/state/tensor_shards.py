"""Which part of a tensor this rank holds, and which other ranks hold the same part.

Every rank holds all of a plain tensor, and one shard of a DTensor (FSDP2, tensor parallel).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from guardrail.core.errors import UsageError
from guardrail.rundir.manifest import Box
from guardrail.torch.state import foreach


def local_storage(tensor: Tensor) -> Tensor:
    """Return the live storage of this rank's part, detached from autograd."""
    if isinstance(tensor, DTensor):
        tensor = foreach.stored_shard(tensor)
    return tensor.detach()


def box_of(tensor: DTensor) -> Box:
    """Return the part of a DTensor that this rank holds.

    Raises:
        UsageError: it is a partial sum.
    """
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise UsageError(
            "a DTensor is a partial sum, which cannot be saved. Reduce it first (full_tensor)."
        )
    offset, size = foreach.shard_place(tensor)
    return Box(global_shape=tuple(tensor.shape), offset=offset, size=size)


def replica_of(tensor: Tensor, holders: range) -> tuple[int, int]:
    """Return (index, count) of this rank among those that hold the same part of `tensor`.

    Args:
        holders: the ranks that hold the pipeline stage of `tensor`.
    """
    if not isinstance(tensor, DTensor):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return holders.index(rank), len(holders)
    index, count = 0, 1
    coordinate = tensor.device_mesh.get_coordinate() or [0] * tensor.device_mesh.ndim
    for position, size, placement in zip(
        coordinate, tensor.device_mesh.shape, tensor.placements, strict=True
    ):
        if placement.is_replicate():
            index, count = index * size + position, count * size
    mesh_index, meshes = _mesh_index(tensor.device_mesh, holders)
    return mesh_index * count + index, meshes * count


def _mesh_index(mesh: DeviceMesh, holders: range) -> tuple[int, int]:
    """Return (index, count) of this mesh among the equal meshes that together cover `holders`.

    Under tensor parallelism a norm is sharded over the data-parallel mesh alone, and each rank of
    the tensor-parallel group has its own such mesh.
    """
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == len(holders):
        return 0, 1
    offsets = [rank - ranks[0] for rank in ranks]
    firsts: list[int] = []
    covered: set[int] = set()
    for rank in holders:
        if rank not in covered:
            firsts.append(rank)
            covered.update(rank + offset for offset in offsets)
    return firsts.index(ranks[0]), len(firsts)
