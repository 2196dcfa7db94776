"""Which part of a whole tensor lies on this rank, and which other ranks hold the same part.

A plain tensor is whole on every rank; a DTensor (FSDP2, tensor parallel) is the shard of it that
lies here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from guardrail.core.errors import UsageError
from guardrail.rundir.manifest import Box
from guardrail.torch.state import foreach


def local(tensor: Tensor) -> Tensor:
    """This rank's part, the live storage, free of autograd."""
    if isinstance(tensor, DTensor):
        tensor = foreach.stored_shard(tensor)
    return tensor.detach()


def box_of(tensor: DTensor) -> Box:
    """The part of it that lies on this rank.

    Raises:
        UsageError: it is a partial sum.
    """
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise UsageError("a partial DTensor has no value of its own and cannot be saved")
    offset, size = foreach.shard_place(tensor)
    return Box(global_shape=tuple(tensor.shape), offset=offset, size=size)


def replica(tensor: Tensor, holders: range) -> tuple[int, int]:
    """(index, count) of this rank among those that hold the same part of `tensor`.

    Args:
        holders: the ranks that hold the part of the model which `tensor` belongs to.
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
    outer, copies = _place(tensor.device_mesh, holders)
    return outer * count + index, copies * count


def _place(mesh: DeviceMesh, holders: range) -> tuple[int, int]:
    """(number, count) of this mesh among the equal ones that fill up the holders beside it.

    A norm under tensor parallelism lies on the data-parallel mesh alone: each rank of its group has
    one of its own.
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
