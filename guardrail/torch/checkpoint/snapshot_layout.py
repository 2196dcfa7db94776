"""Host memory of snapshots: the places of the tensors, and buffers that are allocated ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guardrail.torch.state import foreach
from guardrail.torch.state.device_thread import DeviceThread

_ALIGNMENT = 64  # bytes, a cache line
_BLOCK = 1 << 27  # bytes of one host allocation; torch rounds pinned ones up to a power of two
_PAGE = 4096  # bytes, the smallest page size of any system


class SnapshotLayout:
    """Names, shapes, types and devices of a state's tensors.

    Also the groups of tensors that one multi-tensor copy takes, computed once.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = list(tensors)
        self._kinds = [(t.shape, t.dtype, t.device) for t in tensors.values()]
        # The strides of a dense copy in the same memory format: equal formats copy as one range of
        # memory.
        self._strides = [torch.empty_like(t, device="meta").stride() for t in tensors.values()]
        self.bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self.devices = {t.device for t in tensors.values() if t.device.type == "cuda"}
        groups: dict[Any, list[int]] = {}
        for index, (_, dtype, device) in enumerate(self._kinds):
            groups.setdefault((device, dtype), []).append(index)
        self.groups = list(groups.values())

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether tensors have these names, shapes, types and devices, in this order."""
        if list(tensors) != self.names:
            return False
        return all(
            (tensor.shape, tensor.dtype, tensor.device) == kind
            for tensor, kind in zip(tensors.values(), self._kinds, strict=True)
        )

    def allocate(self) -> list[Tensor]:
        """Return host tensors of this layout, cut from a few large blocks.

        The blocks are pinned if the tensors come from a GPU.
        """
        places: list[tuple[int, int]] = []  # (block, offset in bytes)
        sizes: list[int] = []
        for shape, dtype, _ in self._kinds:
            room = -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            if not sizes or sizes[-1] + room > _BLOCK:
                sizes.append(0)
            places.append((len(sizes) - 1, sizes[-1]))
            sizes[-1] += room
        is_pinned = bool(self.devices)
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned) for size in sizes]
        for block in blocks:
            # The system provides each page when it is first written.
            block[::_PAGE].zero_()
        tensors: list[Tensor] = []
        kinds = zip(places, self._kinds, self._strides, strict=True)
        for (block_index, start), (shape, dtype, _), stride in kinds:
            end = start + shape.numel() * dtype.itemsize
            content = blocks[block_index][start:end].view(dtype)
            tensors.append(content.as_strided(shape, stride))
        return tensors

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> list[torch.cuda.Event]:
        """Copy all tensors.

        Returns:
            The events to wait for before the host reads targets or writes sources.
        """
        for group in self.groups:
            foreach.copy_tensors(
                [targets[i] for i in group],
                [sources[i] for i in group],
                non_blocking=bool(self.devices),
            )
        events = []
        for device in self.devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return events


class SpareBuffer:
    """A buffer that a thread allocates, so the step that needs it does not wait for the memory."""

    def __init__(self, layout: SnapshotLayout) -> None:
        self._layout = layout
        self._buffers: list[Tensor] | None = None
        self._thread = DeviceThread(self._allocate, name="guardrail-snapshots")
        self._thread.start()

    def _allocate(self) -> None:
        # If there is no memory, `wait` tries again and raises.
        with contextlib.suppress(RuntimeError, MemoryError):
            self._buffers = self._layout.allocate()

    @property
    def ready(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def wait(self) -> list[Tensor]:
        """Return the buffer; allocate it here if the thread could not.

        Raises:
            RuntimeError: torch found no host memory.
        """
        self._thread.join()
        if self._buffers is not None:
            return self._buffers
        return self._layout.allocate()
