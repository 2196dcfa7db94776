"""Threads that may call CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class DeviceThread(threading.Thread):
    """A daemon thread on the CUDA device of the thread that makes it.

    A new thread begins with device 0. Its first call of CUDA (an event, pinned memory) would open a
    second context on GPU 0, of about 0.5 GB, for each rank (pytorch issue 58626).
    """

    def __init__(self, target: Callable[[], None], *, name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self._device: int | None = None
        # A process without a context has chosen no device yet.
        if torch.cuda.is_initialized():
            self._device = torch.cuda.current_device()

    def run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        super().run()
