"""The straggler under DDP, where all ranks' steps take equally long; and what the heartbeat says of
a GPU.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.measure.rank_timing import GpuMeter, RankTimer
from tests.support.ranks import run_ranks

SLOW = 0.2


def paced(rank: int) -> tuple[float, float]:
    """(own seconds, seconds of the whole step): least of three steps in which rank 1 is slow in its
    forward pass.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(64, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)
    )
    wrapped = DistributedDataParallel(model)
    pace = RankTimer(list(model.parameters()))
    own, whole = [], []
    for _ in range(3):
        began = time.perf_counter()
        if rank == 1:
            time.sleep(SLOW)
        wrapped(torch.arange(64)).mean().backward()
        now = time.perf_counter()
        own.append(pace.seconds(began, now))
        whole.append(now - began)
    pace.close()
    before = pace._ready_at
    wrapped(torch.arange(64)).mean().backward()
    assert pace._ready_at == before, "a closed one is off the model"
    return min(own), min(whole)


def test_the_slow_rank_stands_out_though_all_wait_for_it(tmp_path: Path) -> None:
    (fast, fast_step), (slow, slow_step) = run_ranks(paced, 2, folder=tmp_path)
    assert slow >= SLOW and slow_step >= SLOW
    assert fast < fast_step / 2, (
        "the fast one spent most of its step waiting, and its own part does not say so"
    )


def test_without_a_gradient_the_whole_step_counts() -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    pace = RankTimer(list(frozen.parameters()))
    assert pace.seconds(1.0, 3.0) == 2.0
    pace.close()
    weight = torch.nn.Parameter(torch.ones(2))
    pace = RankTimer([weight])
    weight.sum().backward()
    now = time.perf_counter()
    assert pace.seconds(now, now + 2.0) == 2.0, (
        "a gradient of the step before says nothing of this one"
    )


def test_a_machine_without_a_gpu_says_nothing_of_one(tmp_path: Path) -> None:
    assert GpuMeter(torch.device("cpu"))() == (-1.0, 0)
    run = RunDirectory.create(tmp_path, "beat", "")
    heart = Heartbeat(run, 0, seconds=3600)
    heart.meter = GpuMeter(torch.device("cpu"))
    heart.stop()
    assert run.read_ranks()[0].gpu_percent == -1.0


class NVMLError(Exception):
    """As pynvml has it: no RuntimeError, no OSError."""


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("nvidia-ml-py"), RuntimeError("no driver"), NVMLError("MIG")],
    ids=repr,
)
def test_a_gpu_that_cannot_be_asked_is_asked_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def utilization(device: object) -> int:
        asked.append(device)
        if len(asked) > 1:
            raise error
        return 87

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    meter = GpuMeter(torch.device("cuda", 0))
    assert [meter() for _ in range(4)] == [(87.0, 5_000_000), *[(-1.0, 5_000_000)] * 3]
    assert len(asked) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that answers")
def test_what_asks_the_driver_may_be_missing(tmp_path: Path) -> None:
    """Torch's own way, on a machine without nvidia-ml-py or without a driver: the heart goes on
    beating.
    """
    run = RunDirectory.create(tmp_path, "beat", "")
    heart = Heartbeat(run, 0, seconds=3600)
    heart.meter = GpuMeter(torch.device("cuda", 0))
    heart.stop()
    told = run.read_ranks()[0]
    assert (told.gpu_percent, told.gpu_memory_bytes) == (-1.0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_read_without_waiting_for_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    meter = GpuMeter(device)
    before = meter()[1]
    held = torch.ones(1 << 20, device=device)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(int(5e9))  # cycles: seconds of work
    done.record()
    busy, memory = meter()
    assert not done.query(), "the work that was handed out goes on"
    assert memory - before >= held.numel() * 4
    torch.cuda.synchronize()
    try:
        import pynvml  # noqa: F401
    except ImportError:
        assert busy == -1.0
    else:
        assert -1.0 <= busy <= 100.0
