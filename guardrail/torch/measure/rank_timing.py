"""How long a rank works on its own part of a step, and how busy its GPU is.

Under data parallelism all ranks end their backward passes together, because gradients are averaged
in it. A step takes as long on the fastest rank as on the slowest, so step time does not show which
rank is slow. The time of a rank's own last gradient shows it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class RankTimer:
    """Records when the last gradient of this rank is made.

    The parameter that is used first, which models register first, gets its gradient last. Its hook
    runs when the gradient is written; DDP waits for the other ranks only after that. Where no hook
    runs (FSDP gathers its own copies), the end of the backward pass counts. On a GPU, the time is
    that at which the host had launched all work.

    Args:
        parameters: in the order of the model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._ready_at = 0.0
        self._hook: RemovableHandle | None = None
        first = next((p for p in parameters if p.requires_grad and p.is_leaf), None)
        if first is not None:
            self._hook = first.register_post_accumulate_grad_hook(self._record)

    def _record(self, _: Tensor) -> None:
        self._ready_at = time.perf_counter()

    def seconds(self, began: float, now: float) -> float:
        """Return the seconds of this rank's own work since `began`."""
        if self._ready_at > began:
            return self._ready_at - began
        return now - began

    def close(self) -> None:
        """Remove the hook from the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class GpuMeter:
    """Utilisation and memory of a GPU, for the heartbeat. What fails once is not asked again.

    Neither waits for the GPU: the driver counts utilisation (NVML), torch's allocator counts
    memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_utilisation = device.type == "cuda"

    def __call__(self) -> tuple[float, int]:
        """Return (utilisation, memory).

        Utilisation: per cent of the last second, or of less, in which the GPU was busy; -1:
        unknown. Memory: bytes in use; 0: unknown.
        """
        if self._device.type != "cuda":
            return -1.0, 0
        memory = int(torch.cuda.memory_allocated(self._device))
        if not self._has_utilisation:
            return -1.0, memory
        try:
            return float(torch.cuda.utilization(self._device)), memory
        except Exception:
            # ImportError without nvidia-ml-py. NVMLError, of a module that may be missing, without
            # the driver's library, in a slice of a GPU, or without permission.
            self._has_utilisation = False
            return -1.0, memory
