"""Joins the default process group, and gives every group of the run the configured timeout.

Accelerate is not asked for the timeout. It drops a value that equals its own default (600 s), and
gloo then waits for 30 minutes (accelerate issues 2611 and 2703). Groups of a DeviceMesh take no
timeout at all (pytorch issues 119574 and 119613).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from guardrail.core.errors import WorkersFailed
from guardrail.torch.state.collectives import gather_objects


def join_process_group(device: torch.device, *, timeout: float) -> None:
    """Join the default process group that torchrun's variables describe.

    Does nothing in a process that belongs to no group, or has joined one.

    Args:
        device: of this rank. NCCL is bound to it at once, so it opens no context on another GPU.
        timeout: seconds that a collective waits for another rank.
    """
    described = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if not described or dist.is_initialized():
        return
    named: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        named = {"backend": "nccl", "device_id": device}
    dist.init_process_group(timeout=timedelta(seconds=timeout), **named)


def set_timeouts(seconds: float, *, mesh: DeviceMesh | None = None) -> None:
    """Set the timeout of the default group and of each group of `mesh`; then read all back.

    Raises:
        WorkersFailed: a group has another timeout.
    """
    if not dist.is_initialized():
        return
    groups = [dist.group.WORLD]
    if mesh is not None:
        groups += mesh.get_all_groups()
    for group in groups:
        # Private, and the only way for a group that exists. test_process_group.py names it.
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    for group in groups:
        for found in read_timeouts(group):
            if found != seconds:
                raise WorkersFailed(
                    f"a process group of this rank has a timeout of {found:g} s: torch has not taken "
                    f"launch.collective_timeout = {seconds:g}"
                )


def read_timeouts(group: Any) -> list[float]:
    """Return the timeout of each backend of a group, in seconds."""
    timeouts = []
    for device in group._device_types:
        options = group._get_backend(device).options
        timeouts.append(options._timeout.total_seconds())
    return timeouts


def cuda_device_of_rank() -> torch.device:
    """Return the GPU of this rank: the one with its local rank.

    Raises:
        WorkersFailed: this process finds no such GPU. Accelerate would take the local rank modulo
            the number of GPUs, and two ranks would share one.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise WorkersFailed(
            f"local rank {local_rank} has no GPU of its own: torch finds {found} in this process. "
            "Check launch.processes and CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def check_own_gpu(device: torch.device) -> None:
    """Compare the GPUs of all ranks. A collective, on GPUs only.

    Raises:
        WorkersFailed: two ranks have the same GPU.
    """
    if device.type != "cuda" or not dist.is_initialized():
        return
    own = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    refuse_shared_gpu(gather_objects(own, dist.get_world_size()))


def refuse_shared_gpu(gpus: Iterable[tuple[str, str]]) -> None:
    """Raise WorkersFailed if two ranks name the same (host, UUID of the GPU)."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(gpus):
        first = ranks.setdefault(gpu, rank)
        if first != rank:
            host, uuid = gpu
            raise WorkersFailed(
                f"ranks {first} and {rank} have the same GPU: {uuid} on {host}. Check "
                "launch.processes and CUDA_VISIBLE_DEVICES"
            )
