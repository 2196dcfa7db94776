"""Collectives of Python objects over all ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any, world: int) -> list[Any]:
    """Return the values of all ranks, by rank. A collective of all `world` ranks."""
    if world == 1:
        return [value]
    by_rank: list[Any] = [None] * world
    dist.all_gather_object(by_rank, value)
    return by_rank
