"""Each thread of the guard uses the GPU of its rank, before it calls CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from guardrail.torch.checkpoint.snapshot_layout import SnapshotLayout, SpareBuffer
from guardrail.torch.checkpoint.writer_thread import WriterThread
from guardrail.torch.state.slow_work import run_together

RANK_DEVICE = 3


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Return thread name -> device that it has chosen; CUDA is mocked."""
    devices: dict[str, int] = {}

    def set_device(device: int) -> None:
        devices[threading.current_thread().name] = device

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: RANK_DEVICE)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    yield devices


def expect_chosen(devices: dict[str, int]) -> Callable[[], Any]:
    """Return work that fails where its thread has not chosen its device before."""
    return lambda: devices[threading.current_thread().name]


def test_the_writer_of_checkpoints(chosen: dict[str, int]) -> None:
    writer, found = WriterThread("writer"), []
    writer.submit(lambda: found.append(expect_chosen(chosen)()))
    assert writer.close(20.0)
    assert found == [RANK_DEVICE]


def test_the_allocation_of_a_spare_buffer(
    chosen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    allocate = SnapshotLayout.allocate

    def noted(self: SnapshotLayout) -> list[torch.Tensor]:
        found.append(expect_chosen(chosen)())
        return allocate(self)

    monkeypatch.setattr(SnapshotLayout, "allocate", noted)
    assert len(SpareBuffer(SnapshotLayout({"a": torch.zeros(3)})).wait()) == 1
    assert found == [RANK_DEVICE]


def test_slow_work(chosen: dict[str, int]) -> None:
    def gather(value: Any) -> list[Any]:
        return [value, value]

    assert run_together(expect_chosen(chosen), gather, world=2) == RANK_DEVICE


def test_without_a_context_no_device_is_chosen(
    chosen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    writer = WriterThread("writer")
    writer.submit(lambda: None)
    assert writer.close(20.0)
    assert chosen == {}
