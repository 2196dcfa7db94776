"""Process groups: each has the configured timeout, and no two ranks have the same GPU."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from guardrail.core.errors import WorkersFailed
from guardrail.core.sections import LaunchSection
from tests.support.ranks import run_ranks
from trainer.config.config import Config
from trainer.config.layout import ParallelSection
from trainer.config.recipe import ModelSection
from trainer.config.sections import TrainSection
from trainer.model import Decoder
from trainer.parallel import process_group
from trainer.parallel.data_parallel import distribute_model, make_accelerator


def settings(seconds: float, **parallel: int) -> Config:
    strategy = "fsdp" if parallel else "ddp"
    return Config(
        launch=LaunchSection(processes=2, device="cpu", threads=1, collective_timeout=seconds),
        model=ModelSection(layers=2, width=16, heads=2),
        train=TrainSection(batch_size=4, strategy=strategy),
        parallel=ParallelSection(**parallel),
    )


@pytest.mark.parametrize("seconds", [60.0, 600.0, 3600.0])
@pytest.mark.parametrize("parallel", [{}, {"dp_shard": 2}, {"tp": 2}, {"pp": 2}])
def test_every_group_has_the_configured_timeout(
    tmp_path: Path, seconds: float, parallel: dict[str, int]
) -> None:
    config = settings(seconds, **parallel)
    for found in run_ranks(_timeouts, 2, config, folder=tmp_path, init=False):
        # The default group, and one for each dimension of the mesh.
        assert len(found) >= (5 if parallel else 1)
        assert set(found) == {seconds}


def _timeouts(rank: int, config: Config) -> list[float]:
    accelerator = make_accelerator(config)
    decoder = Decoder(config.model, vocabulary=29, sequence_length=8, seed=1)
    distribute_model(decoder, config, accelerator)
    found = []
    for group in distributed_c10d._world.pg_map:
        found += process_group.read_timeouts(group)
    return found


def test_a_group_that_keeps_another_timeout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a torch in which the private function no longer does anything.
    monkeypatch.setattr(distributed_c10d, "_set_pg_timeout", lambda *given: None)
    assert run_ranks(_refused_timeout, 1, folder=tmp_path) == ["refused"]


def _refused_timeout(rank: int) -> str:
    distributed_c10d._get_default_group()
    with pytest.raises(WorkersFailed):
        process_group.set_timeouts(42.0)
    return "refused"


def test_without_a_group_there_is_nothing_to_set() -> None:
    process_group.set_timeouts(60.0)
    process_group.check_own_gpu(torch.device("cpu"))
    assert not dist.is_initialized()


def test_nccl_is_bound_to_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda **given: calls.append(given))
    device = process_group.cuda_device_of_rank()
    process_group.join_process_group(device, timeout=90.0)
    assert calls == [
        {
            "backend": "nccl",
            "device_id": torch.device("cuda", 3),
            "timeout": timedelta(seconds=90.0),
        }
    ]


@pytest.mark.parametrize(("local_rank", "gpus"), [(1, 1), (2, 2), (0, 0)])
def test_a_rank_without_a_gpu_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, gpus: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(WorkersFailed):
        process_group.cuda_device_of_rank()


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    process_group.refuse_shared_gpu([("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-2")])
    with pytest.raises(WorkersFailed, match="ranks 0 and 2"):
        process_group.refuse_shared_gpu([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")])
    # The whole path, with the collective and the properties replaced.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1")
    )

    def gather(gathered: list[object], own: object) -> None:
        gathered[:] = [own, own]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(WorkersFailed):
        process_group.check_own_gpu(torch.device("cuda", 0))
