"""When a rank has done its own part of a step, before it waits for the others; and how busy its GPU
is.

Under data parallelism all ranks end their backward passes together, because gradients are averaged
in it: a step takes as long on the fastest rank as on the slowest, and the slow one cannot be told
by that. What tells it is when its own last gradient was there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor


class RankTimer:
    """Notes when the last gradient of this rank is made.

    The parameter that is used first, which models register first, gets its gradient last. Its hook
    runs where the gradient is written, and DDP waits for the others only after that; where no hook
    runs (FSDP gathers its own copies) the end of the whole backward pass counts. On a GPU it is the
    time at which the host had handed all work out.

    Args:
        parameters: in the order of the model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._ready = 0.0
        first = next((p for p in parameters if p.requires_grad and p.is_leaf), None)
        self._hook = (
            first.register_post_accumulate_grad_hook(self._note) if first is not None else None
        )

    def _note(self, _: Tensor) -> None:
        self._ready = time.perf_counter()

    def seconds(self, began: float, now: float) -> float:
        """What this rank has worked itself for since `began`."""
        return (self._ready if self._ready > began else now) - began

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class GpuMeter:
    """Utilisation and memory of a GPU, for the heartbeat; what cannot be had is unknown, and is
    asked for once.

    Neither waits for the GPU: the one is the driver's count (NVML), the other that of torch's own
    allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = device.type == "cuda"

    def __call__(self) -> tuple[float, int]:
        """(per cent of the last second, or less, in which the GPU was busy, -1 unknown; bytes in
        use, 0 unknown).
        """
        if self._device.type != "cuda":
            return -1.0, 0
        memory = int(torch.cuda.memory_allocated(self._device))
        if not self._known:
            return -1.0, memory
        try:
            return float(torch.cuda.utilization(self._device)), memory
        except Exception:
            # Without nvidia-ml-py an ImportError; without the driver's library, in a slice of a
            # GPU, or without the right to ask an NVMLError: a kind of its own, in a module that may
            # be missing. The heartbeat outlives it.
            self._known = False
            return -1.0, memory
