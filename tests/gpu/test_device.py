"""What only a CUDA device can show: one needs a GPU, some need two. They have not been run where
this was written.

Each test trains in processes of its own, by the command that torch elastic starts: the other tests
fork, which no process with a CUDA context may. `python -m tests.gpu.test_device FUNCTION FOLDER` runs
one of the functions below.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from guardrail.core.config import GuardConfig
from guardrail.core.errors import UsageError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command
from guardrail.core.sections import SnapshotSection
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.memory_snapshots import SnapshotRing
from guardrail.torch.guard.deferred_gate import DeferredGate
from guardrail.torch.guard.guard import Guard, Step
from guardrail.torch.state.training_state import TrainingState
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.running import assert_same, new_run, of_kind, outcome, table, tiny, told
from trainer.config.config import Config
from trainer.train import Trainer

DEVICE = "cuda"


def _devices() -> int:
    return torch.cuda.device_count()  # without a context


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_devices() < 1, reason="needs a CUDA device")]
two_devices = pytest.mark.skipif(_devices() < 2, reason="needs two CUDA devices")


def device_config(folder: Path, **sections: Any) -> Config:
    """`tiny` on the device, bf16 and deterministic unless told otherwise."""
    world = sections.get("world", 1)
    launch = {"device": DEVICE, "processes": world, "threads": 1, "collective_seconds": 120.0}
    train = {"steps": 40, "precision": "bf16", "deterministic": True, **sections.pop("train", {})}
    return tiny(
        folder,
        launch=launch,
        train=train,
        model={"width": 64, **sections.pop("model", {})},
        **sections,
    )


def train(run: RunDirectory, world: int, *, seconds: float = 600.0) -> str:
    """Train a run directory to its end on `world` devices of this machine; returns how it ended."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    shared |= {
        "LOCAL_WORLD_SIZE": str(world),
        "GUARDRAIL_RUN": str(run.path),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=seconds)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, errors
    return outcome(run)


def trained(config: Config) -> RunDirectory:
    run = new_run(config)
    assert train(run, config.world) == "finished"
    return run


def apart(function: Any, folder: Path) -> None:
    """Call `function(folder)` in an interpreter of its own."""
    command = [sys.executable, "-m", "tests.gpu.test_device", function.__name__, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


# Trouble of the data, of one rank alone, and of the state.
def faults(rank: int) -> list[dict[str, Any]]:
    return [
        {"kind": "nan_loss", "first": 104, "last": 105},
        {"kind": "inf_grad", "step": 17, "rank": rank, "times": 1},
        {"kind": "scale_weights", "step": 27, "times": 1, "value": 1000.0},
    ]


SHAPES = [
    pytest.param(1, "ddp", {}, id="one"),
    pytest.param(1, "ddp", {"compile": True}, id="one, compiled"),
    pytest.param(2, "ddp", {}, id="ddp", marks=two_devices),
    pytest.param(2, "fsdp", {}, id="fsdp", marks=two_devices),
    pytest.param(2, "fsdp", {"compile": True}, id="fsdp, compiled", marks=two_devices),
]


@pytest.mark.parametrize(("world", "strategy", "options"), SHAPES)
def test_a_run_on_devices_is_the_run_that_was_told_before(
    world: int, strategy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """NCCL, fused AdamW, pinned copies: what came of three kinds of trouble, bit by bit."""
    config = device_config(
        tmp_path, world=world, strategy=strategy, faults=faults(world - 1), train=options
    )
    run = trained(config)
    assert {"verdict", "rollback", "skipped"} <= {event.kind for event in run.events()}
    seen = [
        f["ranks"]
        for event in of_kind(run, "verdict")
        for f in event.data["findings"]
        if f["signal"] == "grad_norm"
    ]
    assert [world - 1] in seen
    assert_same(run, trained(msgspec.structs.replace(told(config, run), faults=())))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("world", "strategy"), [(1, "ddp"), pytest.param(2, "fsdp", marks=two_devices)]
)
def test_stopped_and_resumed_on_devices(
    world: int, strategy: str, precision: str, tmp_path: Path
) -> None:
    config = device_config(tmp_path, world=world, strategy=strategy, train={"precision": precision})
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=23))
    assert train(run, world) == "stopped"
    assert train(run, world) == "finished"
    assert_same(run, trained(config))


@pytest.mark.parametrize(
    ("world", "strategy"),
    [(1, "ddp"), *(pytest.param(2, s, marks=two_devices) for s in ("ddp", "fsdp"))],
)
def test_the_lagged_gate_changes_nothing_on_devices(
    world: int, strategy: str, tmp_path: Path
) -> None:
    runs = [
        trained(
            device_config(
                tmp_path,
                world=world,
                strategy=strategy,
                faults=faults(world - 1),
                guard={"gate": gate},
            )
        )
        for gate in ("sync", "lagged")
    ]
    assert_same(*runs)


def test_a_device_follows_the_curve_of_the_host(tmp_path: Path) -> None:
    """fp32 without dropout, whose dice are other ones there."""
    options: dict[str, Any] = {"model": {"dropout": 0.0}, "train": {"precision": "fp32"}}
    there = trained(device_config(tmp_path, **options))
    here = trained(
        tiny(
            tmp_path, train={"steps": 40, "precision": "fp32"}, model={"width": 64, "dropout": 0.0}
        )
    )
    signals = ("loss", "grad_norm", "embed_grad_norm")
    torch.testing.assert_close(
        table(there, signals)[0], table(here, signals)[0], rtol=1e-4, atol=0.0
    )
    torch.testing.assert_close(
        table(there, signals)[:, 0], table(here, signals)[:, 0], rtol=1e-2, atol=0.0
    )


@pytest.mark.parametrize("function", ["healthy_steps_of_a_loop", "healthy_steps_of_the_trainer"])
def test_a_healthy_step_makes_the_host_wait_for_nothing(function: str, tmp_path: Path) -> None:
    apart(globals()[function], tmp_path)


def test_copies_from_a_device_are_pinned_complete_and_exact(tmp_path: Path) -> None:
    apart(pinned_copies, tmp_path)


# -- run in an interpreter of their own


def healthy_steps_of_a_loop(_: Path) -> None:
    """torch raises at whatever would make the host wait for the device: reading a number, a
    blocking copy.
    """
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16)).to(
        DEVICE
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = Guard.from_config(
        GuardConfig(guard=GuardOptions(decide="lagged"), snapshots=SnapshotSection(every=50)),
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200),
        data=SampleOrder(samples=4000, seed=1),
        batch_size=8,
        total_steps=120,
    )
    assert guard.deferred_gate is not None
    tokens = torch.randint(0, 16, (8, 9), device=DEVICE)
    count = torch.tensor(8.0, device=DEVICE)
    quiet = 0
    for step in guard:
        watched = step.number % 50 not in (0, 1) and 4 < step.number < 120
        flown = guard.deferred_gate.deferred_steps
        with no_wait(guard.deferred_gate, watched):
            loss = nn.functional.cross_entropy(
                model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
            )
            loss.backward()
            step.finish(loss, tokens=count)
        quiet += watched and guard.deferred_gate.deferred_steps > flown
    assert guard.step == 120 and quiet > 90, quiet


def healthy_steps_of_the_trainer(folder: Path) -> None:
    """The same for the whole step of the trainer, bf16 and accumulation included."""
    train = {"steps": 60, "deterministic": False}
    trainer = Trainer(
        device_config(folder, guard={"gate": "lagged"}, snapshots={"every": 30}, train=train)
    )
    lagged = trainer.guard.deferred_gate
    assert lagged is not None
    quiet = 0
    for step in trainer.guard:
        watched = step.number % 30 not in (0, 1) and 4 < step.number < 60
        flown = lagged.deferred_steps
        with no_wait(lagged, watched):
            trainer.train_step(step)
        quiet += watched and lagged.deferred_steps > flown
    trainer.loader.close()
    assert trainer.guard.step == 60 and quiet > 30, quiet


@contextlib.contextmanager
def no_wait(lagged: DeferredGate, watched: bool) -> Iterator[None]:
    """Where `watched`, a synchronisation is an error; not from where the guard has found that it
    must wait.
    """
    safe_limits = lagged.safe_limits

    def asked(step: Step, *, wait: bool) -> list[float] | None:
        most = safe_limits(step, wait=wait)
        if most is None:
            torch.cuda.set_sync_debug_mode("default")
        return most

    lagged.safe_limits = asked  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error" if watched else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        lagged.safe_limits = safe_limits  # type: ignore[method-assign]


def pinned_copies(_: Path) -> None:
    model = torch.nn.Linear(1024, 1024, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    ring = SnapshotRing(TrainingState(model, optimizer), 2)
    for _step in range(3):
        model(torch.ones(4, 1024, device=DEVICE)).sum().backward()
        optimizer.step()
    before = ring.state.digests()
    snapshot = ring.take(3, 3, 0, {})
    with torch.no_grad():
        model.weight.mul_(0)
    snapshot.wait()
    assert all(tensor.is_pinned() for tensor in snapshot.tensors.values())
    ring.restore(snapshot)
    assert ring.state.digests() == before
    assert optimizer.state[model.weight]["step"].device.type == DEVICE, (
        "the fused step keeps its count there"
    )
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    try:
        Guard(
            GuardConfig(guard=GuardOptions(decide="lagged")),
            model=model,
            optimizer=plain,
            order=SampleOrder(samples=8),
            batch_size=2,
        )
    except UsageError as error:
        assert "found_inf" in str(error)
    else:
        raise AssertionError("an optimizer that cannot be told to leave out was taken")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
