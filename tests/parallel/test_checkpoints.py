from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.files import TEMPORARY
from guardrail.core.records.status import SnapshotInfo
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import MANIFEST, read_manifest, sealed
from guardrail.rundir.verification import fingerprint, verify
from guardrail.torch.checkpoint import commit as commit_module
from guardrail.torch.checkpoint import disk_checkpoints as checkpoints_module
from guardrail.torch.checkpoint import rank_share
from guardrail.torch.checkpoint import safetensors_file as shards_module
from guardrail.torch.checkpoint.checkpoint_index import CheckpointEvent
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.loader import CheckpointLoader
from guardrail.torch.checkpoint.memory_snapshots import Snapshot, SnapshotRing
from guardrail.torch.checkpoint.retention import find_superfluous
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD, INVALID, SUSPECT
from guardrail.torch.state import rng_state as rng
from guardrail.torch.state.training_state import TrainingState
from tests.support.ranks import run_ranks
from tests.support.texts import numbers_in
from tests.support.tiny import Setup

SECONDS = 60.0  # for what takes milliseconds, on a machine that is busy with something else


class Run(Setup):
    """A tiny training with both tiers."""

    def __init__(
        self,
        folder: Path,
        kind: str = "plain",
        optimizer: str = "adamw-foreach",
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(kind, optimizer, seed=seed)
        self.state = TrainingState(self.model, self.optimizers, self.schedulers)
        self.ring = SnapshotRing(self.state, 3)
        self.store = CheckpointStore(
            folder, self.state, rank=self.rank, world=self.world, **options
        )

    def take(self, step: int, timeline: int = 0, **extra: Any) -> Snapshot:
        return self.ring.take(step, step * 8, timeline, extra)

    def save(self, step: int, timeline: int = 0, **extra: Any) -> list[CheckpointEvent]:
        """Save and wait; the events of it."""
        self.store.save(self.take(step, timeline, **extra), {"config": "abc"})
        assert self.store.wait(SECONDS)
        return self.store.take_events()


@pytest.fixture(autouse=True)
def closed_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a thread behind: the next one forks."""
    stores: list[CheckpointStore] = []
    original = CheckpointStore.__init__

    def counted(self: CheckpointStore, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        stores.append(self)

    monkeypatch.setattr(CheckpointStore, "__init__", counted)
    yield
    for store in stores:
        store.close()
    assert writers() == []


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "guardrail-checkpoints"]


def test_without_a_ring_a_save_alone_holds_a_copy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.ring = SnapshotRing(run.state, 0)
    snapshot = run.take(4)
    assert run.ring.infos() == [] and run.ring.get(4) is None
    run.store.save(snapshot)
    held = weakref.ref(snapshot)
    del snapshot
    assert run.store.wait(SECONDS)
    for _ in range(100):  # the thread lets go of it right behind the end of its work
        if held() is None:
            break
        time.sleep(0.05)
    assert held() is None
    assert [event.state for event in run.store.take_events()] == ["candidate"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# -- save and load ---------------------------------------------------------------------------------


def saved_run(
    rank: int, folder: Path, kind: str, optimizer: str
) -> tuple[list[float], list[CheckpointEvent]]:
    """Train 4 steps, save, train on: the losses after the save."""
    run = Run(folder, kind, optimizer)
    run.steps(1, 5)
    events = run.save(4, rank=rank)
    return run.steps(5, 8), events


def resumed_run(
    rank: int, folder: Path, kind: str, optimizer: str
) -> tuple[list[float], dict[str, str], Any]:
    run = Run(folder, kind, optimizer, seed=77)
    selection = run.store.find_newest_valid()
    assert selection.path is not None and selection.refused == ()
    loaded = run.store.load(selection.path)
    assert (
        loaded.manifest.step == 4
        and loaded.manifest.cursor == 32
        and loaded.manifest.identity == {"config": "abc"}
    )
    return run.steps(5, 8), loaded.checks, loaded.extra


def ranks_of(kind: str) -> int:
    return 1 if kind == "plain" else 2


LAYOUTS = ["plain", "ddp", "fsdp"]
ALL_OK = {"weights": "ok", "moments": "ok", "schedule": "ok", "buffers": "ok"}


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused", "sgd"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_resume_equals_going_on_bit_by_bit(kind: str, optimizer: str, tmp_path: Path) -> None:
    """Case 3 and law 3, on disk."""
    folder, world = tmp_path / "checkpoints", ranks_of(kind)
    went_on = run_ranks(
        saved_run, world, folder, kind, optimizer, folder=tmp_path / "a", init=world > 1
    )
    resumed = run_ranks(
        resumed_run, world, folder, kind, optimizer, folder=tmp_path / "b", init=world > 1
    )
    assert names(folder) == ["step-00000004"]
    assert [event.state for event in went_on[0][1]] == ["candidate"]
    for rank in range(world):
        assert resumed[rank][0] == went_on[rank][0]
        assert resumed[rank][1] == ALL_OK
        assert resumed[rank][2] == {"rank": rank}


def test_a_checkpoint_loads_on_any_number_of_ranks_and_either_strategy(tmp_path: Path) -> None:
    prints = set()
    for kind in LAYOUTS:
        folder, world = tmp_path / kind, ranks_of(kind)
        run_ranks(reshard_source, world, folder, kind, folder=tmp_path / "a", init=world > 1)
        prints.add(fingerprint(checkpoint_dirs(folder)[0]))
        for other in LAYOUTS:
            again, count = tmp_path / f"{kind}-{other}", ranks_of(other)
            checks = run_ranks(
                reshard, count, folder, again, other, folder=tmp_path / "b", init=count > 1
            )
            # Comparable wherever a rank holds now what a rank held then.
            comparable = (kind == "fsdp") == (other == "fsdp")
            assert checks == [ALL_OK if comparable else {"schedule": "ok"}] * count
            source, target = checkpoint_dirs(folder)[0], checkpoint_dirs(again)[0]
            assert fingerprint(source) == fingerprint(target)
            assert whole(source) == whole(target)
    # trained with the same batches, written by 1 or 2 ranks, whole or sharded
    assert len(prints) == 1


def reshard_source(rank: int, folder: Path, kind: str) -> None:
    """One rank's worth of training on every rank, so that all layouts hold the same numbers."""
    run = Run(folder, kind)
    run.rank, run.world = 0, 1
    run.steps(1, 5)
    run.rank, run.world = (
        (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    )
    run.save(4)


def reshard(rank: int, source: Path, target: Path, kind: str) -> dict[str, str]:
    run = Run(source, kind, seed=5)
    path = run.store.find_newest_valid().path
    assert path is not None
    checks = run.store.load(path).checks
    other = CheckpointStore(target, run.state, rank=run.rank, world=run.world)
    other.save(run.take(4), {})
    assert other.wait(SECONDS)
    return checks


def test_the_folder_is_there_before_another_rank_can_write_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faster rank found no folder for its share, and none to say so in: rank 0 waited for it in
    vain.
    """
    folder, seen = tmp_path / "new" / "checkpoints", []
    gather = CheckpointLoader.gather

    def looked(loader: CheckpointLoader, value: Any) -> list[Any]:
        seen.append(folder.is_dir())
        return gather(loader, value)

    monkeypatch.setattr(CheckpointLoader, "gather", looked)
    CheckpointStore(folder, Run(tmp_path / "run", "plain").state)
    assert seen[-1]


def whole(path: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, moments and buffers included, put together again."""
    from guardrail.rundir.manifest import Box

    manifest = read_manifest(path)
    boxes = {name: Box.of_shape(tensor.shape) for name, tensor in manifest.tensors.items()}
    parts = shards_module.read_parts(path, manifest, boxes)
    return {name: shards_module.raw_bytes(tensor).tobytes() for name, tensor in parts.items()}


def test_ranks_share_the_writing_of_what_they_all_hold(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_ranks(saved_run, 2, folder, "ddp", "adamw-foreach", folder=tmp_path / "a")
    manifest = verify(checkpoint_dirs(folder)[0])
    assert {len(tensor.pieces) for tensor in manifest.tensors.values()} == {1}
    sizes = [file.bytes for file in manifest.files]
    assert max(sizes) < 1.3 * min(sizes)
    assert manifest.tensors["buffer/seen"].pieces[0].file == "rank-00000.safetensors"


def test_more_ranks_than_tensors(tmp_path: Path) -> None:
    def lonely(rank: int, folder: Path) -> dict[str, str]:
        model = torch.nn.Linear(3, 1, bias=False)
        state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        store = CheckpointStore(folder, state, rank=rank, world=2)
        store.save(SnapshotRing(state, 2).take(1, 1, 0, {}))
        assert store.wait(SECONDS)
        dist.barrier()
        path = store.find_newest_valid().path
        assert path is not None
        return store.load(path).checks

    checks = run_ranks(lonely, 2, tmp_path / "checkpoints", folder=tmp_path / "a")
    assert checks == [{"weights": "ok", "moments": "ok", "schedule": "ok"}] * 2


# -- cold moments, schedule, dice (cases 3, 5, 6, 7) -----------------------------------------------


def test_a_checkpoint_without_moments_is_refused_unless_weights_are_all_that_is_wanted(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.steps(1, 51)
    for optimizer in run.optimizers:
        optimizer.state.clear()  # as a state dict of a never-stepped optimizer would leave it
    run.save(50)
    path = checkpoint_dirs(tmp_path)[0]

    other = Run(tmp_path, seed=3)
    other.steps(1, 3)
    before = other.state.digests()
    with pytest.raises(CheckpointInvalid, match=r"step 50\b.*weights_only=True"):
        other.store.load(path)
    assert other.state.digests() == before
    loaded = other.store.load(path, weights_only=True)
    assert loaded.checks == {
        "weights": "ok",
        "buffers": "ok",
        "moments": "cold",
        "schedule": "cold",
    }
    after = other.state.digests()
    assert after["weights"] == run.state.digests()["weights"]
    assert (after["moments"], after["schedule"]) == (before["moments"], before["schedule"])


def test_an_optimizer_that_keeps_nothing_by_nature_resumes(tmp_path: Path) -> None:
    run = Run(tmp_path, optimizer="sgd")
    run.steps(1, 4)
    run.save(3)
    assert read_manifest(checkpoint_dirs(tmp_path)[0]).stateless
    other = Run(tmp_path, optimizer="sgd", seed=1)
    other.store.load(checkpoint_dirs(tmp_path)[0])
    assert other.steps(4, 7) == run.steps(4, 7)
    momentum = Run(tmp_path, optimizer="momentum", seed=1)
    with pytest.raises(CheckpointInvalid, match="weights_only=True"):
        momentum.store.load(checkpoint_dirs(tmp_path)[0])


def test_the_checkpoint_of_step_0_needs_no_moments(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(0)
    losses = run.steps(1, 4)
    run.store.load(checkpoint_dirs(tmp_path)[0])
    assert run.steps(1, 4) == losses


def test_learning_rate_and_dice_go_on_where_they_were(tmp_path: Path) -> None:
    """Cases 5 and 6: the schedule inside its decay, and dropout from the global generator."""
    run = Run(tmp_path)
    run.steps(1, 31)
    torch.manual_seed(4)
    torch.rand(7)
    run.save(30, rng=rng.capture_rng_states())
    rate, dice = run.optimizers[0].param_groups[0]["lr"], torch.rand(5)
    other = Run(tmp_path, seed=8)
    assert other.optimizers[0].param_groups[0]["lr"] != rate
    loaded = other.store.load(checkpoint_dirs(tmp_path)[0])
    rng.restore_rng_states(loaded.extra["rng"])
    assert other.optimizers[0].param_groups[0]["lr"] == rate
    assert torch.equal(torch.rand(5), dice)
    assert other.steps(31, 40) == run.steps(31, 40)
    assert other.optimizers[0].param_groups[0]["lr"] == run.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("component", ["weights", "moments", "schedule"])
def test_the_resume_check_says_what_differs(
    component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 7. Something between the file and the live state goes wrong: here, after the load."""
    run = Run(tmp_path)
    run.steps(1, 4)
    run.save(3)
    load = TrainingState.load

    def spoilt(self: TrainingState, *arguments: Any) -> None:
        load(self, *arguments)
        optimizer = self.optimizers[0]
        if component == "weights":
            run.inner.norm.bias.data[0] += 1e-3
        elif component == "moments":
            optimizer.state[run.inner.norm.bias]["exp_avg"].zero_()
        else:
            optimizer.param_groups[0]["lr"] *= 1.02

    monkeypatch.setattr(TrainingState, "load", spoilt)
    checks = run.store.load(checkpoint_dirs(tmp_path)[0]).checks
    assert numbers_in(checks[component]) == [0], "the rank"
    assert {**checks, component: "ok"} == ALL_OK


# -- finding a valid one (law 5, case 17) ----------------------------------------------------------


def three_saves(folder: Path) -> Run:
    run = Run(folder)
    for step in (1, 2, 3):
        run.step(step)
        run.save(step)
    return run


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit in the tensors": (
        lambda p: flip(p / "rank-00000.safetensors"),
        "SHA-256",
    ),
    "flipped bit in the header": (
        lambda p: flip(p / "rank-00000.safetensors", 20),
        "SHA-256",
    ),
    "flipped bit in the manifest": (lambda p: flip(p / MANIFEST, 300), f"{MANIFEST} "),
    "truncated": (lambda p: cut_off(p / "rank-00000.safetensors"), "rank-00000.safetensors "),
    "empty": (lambda p: (p / "rank-00000.safetensors").write_bytes(b""), " 0 bytes"),
    "missing shard": (
        lambda p: (p / "rank-00000.safetensors").unlink(),
        "rank-00000.safetensors is missing",
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), f"{MANIFEST} "),
    "unknown format": (
        lambda p: (p / MANIFEST).write_bytes(
            sealed(msgspec.structs.replace(read_manifest(p), format=7))
        ),
        " format 7",
    ),
    "old format": (lambda p: (p / MANIFEST).write_text('{"version": 0}'), " format"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_the_reason_told(
    damage: str, tmp_path: Path
) -> None:
    run = three_saves(tmp_path)
    break_it, words = DAMAGE[damage]
    break_it(tmp_path / "step-00000003")
    before = run.state.digests()
    store = CheckpointStore(tmp_path, run.state)
    selection = store.find_newest_valid()
    assert selection.path == tmp_path / "step-00000002"
    ((path, reason),) = selection.refused
    assert (
        path.name == "step-00000003" and words in reason and selection.invalid == {"step-00000003"}
    )
    assert {info.path: info.state for info in store.infos()}["step-00000003"] == INVALID
    with pytest.raises(CheckpointInvalid, match=words):
        store.load(tmp_path / "step-00000003")
    assert run.state.digests() == before
    assert store.load(selection.path).manifest.step == 2


def test_the_hashes_are_checked_again_when_another_is_loaded_than_was_chosen(
    tmp_path: Path,
) -> None:
    run = three_saves(tmp_path)
    flip(tmp_path / "step-00000001" / "rank-00000.safetensors")
    assert run.store.find_newest_valid().path == tmp_path / "step-00000003"
    with pytest.raises(
        CheckpointInvalid, match=r"step-00000001/rank-00000\.safetensors: .*SHA-256"
    ):
        run.store.load(tmp_path / "step-00000001")


def test_all_damaged_or_none_there(tmp_path: Path) -> None:
    run = Run(tmp_path / "empty")
    assert run.store.find_newest_valid().path is None
    run = three_saves(tmp_path / "full")
    for path in checkpoint_dirs(tmp_path / "full"):
        flip(path / "rank-00000.safetensors")
    selection = run.store.find_newest_valid()
    assert selection.path is None and [path.name[-1] for path, _ in selection.refused] == [
        "3",
        "2",
        "1",
    ]


def test_what_is_not_allowed_is_passed_over_without_being_called_invalid(tmp_path: Path) -> None:
    run = three_saves(tmp_path)
    selection = run.store.find_newest_valid(lambda manifest: manifest.step < 3 or "polluted")
    assert selection.path == tmp_path / "step-00000002"
    assert selection.refused == ((tmp_path / "step-00000003", "polluted"),)
    assert selection.invalid == frozenset()
    path, reason = run.store.find_newest_valid(lambda manifest: manifest.step < 2).refused[0]
    assert path == tmp_path / "step-00000003" and reason


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    three_saves(tmp_path)
    model = torch.nn.Linear(3, 3)
    state = TrainingState(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointInvalid, match=r"step-00000003: .*model/weight .*model/bias "):
        CheckpointStore(tmp_path, state).load(tmp_path / "step-00000003")


def verified_in_shares(rank: int, folder: Path) -> tuple[list[str], str]:
    run = Run(folder, "ddp")
    run.step(1)
    run.save(1)
    dist.barrier()
    hashed: list[str] = []
    original = verify

    def watched(path: Path, files: Any = None, progress: Any = None) -> Any:
        hashed.extend(files)
        return original(path, files, progress)

    from guardrail.torch.checkpoint import loader as loading

    loading.verify = watched  # type: ignore[attr-defined]
    assert run.store.find_newest_valid().path == folder / "step-00000001"
    dist.barrier()
    if rank == 0:
        flip(folder / "step-00000001" / "rank-00001.safetensors")
    dist.barrier()
    return hashed, run.store.find_newest_valid().refused[0][1]


def test_ranks_share_the_hashing_and_agree_on_what_one_has_found(tmp_path: Path) -> None:
    outcomes = run_ranks(verified_in_shares, 2, tmp_path / "c", folder=tmp_path / "a")
    assert [hashed[0] for hashed, _ in outcomes] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert outcomes[0][1] == outcomes[1][1] and "rank-00001.safetensors" in outcomes[0][1]


def refused_by_one(rank: int, folder: Path) -> str:
    run = Run(folder, "ddp")
    run.step(1)
    run.save(1)
    dist.barrier()
    run.step(2)
    before = run.state.digests()
    if rank == 1:
        run.store._loader._boxes_to_load = lambda *_, **__: (_ for _ in ()).throw(
            CheckpointInvalid("no")
        )  # type: ignore[method-assign]
    with pytest.raises(CheckpointInvalid) as caught:
        run.store.load(folder / "step-00000001")
    assert run.state.digests() == before
    return str(caught.value)


def test_what_does_not_fit_on_one_rank_is_loaded_on_none(tmp_path: Path) -> None:
    assert (
        run_ranks(refused_by_one, 2, tmp_path / "c", folder=tmp_path / "a")
        == ["step-00000001: no"] * 2
    )


# -- saves that fail (case 18) ---------------------------------------------------------------------


def fails_once(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: BaseException
) -> None:
    original = getattr(module, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, original)
        raise error

    monkeypatch.setattr(module, name, failing)


class DcpLike(BaseException):
    """torch.distributed.checkpoint's CheckpointException derives from BaseException."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470"),
        MemoryError(),
        SystemExit(1),
        KeyboardInterrupt(),
        DcpLike("state dict"),
    ],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "") or ""),
)
@pytest.mark.parametrize(
    ("module", "where"),
    [
        (rank_share, "write_file"),
        (rank_share, "replace_file"),
        (commit_module, "sealed"),
        (commit_module, "verify"),
        (commit_module, "_rename"),
        (rank_share, "component_digests"),
    ],
)
def test_a_save_that_fails_leaves_nothing_and_the_next_succeeds(
    module: Any,
    where: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(tmp_path, retry_seconds=0.0)
    run.step(1)
    assert run.save(1)[0].state == "candidate"
    fails_once(monkeypatch, module, where, error)
    (event,) = run.save(2)
    assert event.state == "failed" and event.step == 2 and event.reason
    assert "\n" not in event.reason
    assert names(tmp_path) == ["step-00000001"]
    assert run.store.degraded and run.store.retry_due and not run.store.busy
    snapshot = run.ring.get(2)
    assert snapshot is not None and not snapshot.pinned
    (event,) = run.save(2)
    assert event.state == "candidate" and not run.store.degraded and not run.store.retry_due
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_retry_waits_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, retry_seconds=3600.0)
    fails_once(monkeypatch, rank_share, "write_file", OSError(errno.EIO, "Input/output error"))
    assert run.save(1)[0].reason == "Input/output error"
    assert run.store.degraded and not run.store.retry_due
    run.store.retry_seconds = 0.0
    assert run.store.retry_due


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of this size; unmounted lazily, for its files may still be open."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def wide_run(folder: Path, **options: Any) -> tuple[CheckpointStore, SnapshotRing]:
    """About 1.2 MB a checkpoint."""
    model = torch.nn.Linear(300, 333)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    state = TrainingState(model, optimizer)
    return CheckpointStore(folder, state, **options), SnapshotRing(state, 2)


def test_a_full_disk_is_seen_beforehand_and_after_making_room_the_save_succeeds(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, "5m"):
        store, ring = wide_run(folder / "checkpoints", retry_seconds=0.0)

        def save(step: int) -> CheckpointEvent:
            store.save(ring.take(step, step, 0, {}))
            assert store.wait(SECONDS)
            return store.take_events()[-1]

        assert [save(step).state for step in (1, 2)] == ["candidate", "candidate"]
        (folder / "other").write_bytes(bytes(1_500_000))
        event = save(3)
        assert event.state == "failed" and event.reason.startswith(os.strerror(errno.ENOSPC))
        assert numbers_in(event.reason)[0] == 2.3, "megabytes that are needed"
        assert names(folder / "checkpoints") == ["step-00000001", "step-00000002"]
        assert all(verify(path) for path in checkpoint_dirs(folder / "checkpoints"))
        assert store.retry_due
        (folder / "other").unlink()
        assert save(4).state == "candidate"


def test_a_disk_that_fills_up_while_it_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the room that was there a moment ago."""
    folder = tmp_path / "disk"
    with small_disk(folder, "5m"):
        store, ring = wide_run(folder / "checkpoints")
        store.save(ring.take(1, 1, 0, {}))
        assert store.wait(SECONDS)
        monkeypatch.setattr(
            rank_share, "_check_room", lambda job: (folder / "o").write_bytes(bytes(3_400_000))
        )
        store.save(ring.take(2, 2, 0, {}))
        assert store.wait(SECONDS)
        assert [event.state for event in store.take_events()] == ["candidate", "failed"]
        assert names(folder / "checkpoints") == ["step-00000001"]


def test_a_file_size_limit_stops_a_save_and_nothing_else(tmp_path: Path) -> None:
    """The kernel's own refusal in the middle of a write, wherever mounting is not permitted."""

    def limited(rank: int) -> list[CheckpointEvent]:
        store, ring = wide_run(tmp_path / "checkpoints")
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
        store.save(ring.take(1, 1, 0, {}))
        assert store.wait(SECONDS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.save(ring.take(2, 2, 0, {}))
        assert store.wait(SECONDS)
        return store.take_events()

    (events,) = run_ranks(limited, 1, folder=tmp_path / "a", init=False)
    assert [(event.state, event.reason) for event in events] == [
        ("failed", os.strerror(errno.EFBIG)),
        ("candidate", ""),
    ]
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


def test_a_disk_that_gives_other_bytes_back_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync
    store, ring = wide_run(tmp_path)

    def rotting(descriptor: int) -> None:
        original(descriptor)
        if os.fstat(descriptor).st_size > 100_000:
            os.pwrite(descriptor, b"\xff\xff\xff\xff", 50_000)

    monkeypatch.setattr(os, "fsync", rotting)
    store.save(ring.take(1, 1, 0, {}))
    assert store.wait(SECONDS)
    (event,) = store.take_events()
    assert event.state == "failed" and "rank-00000.safetensors" in event.reason
    assert names(tmp_path) == []


def one_rank_fails(
    rank: int, folder: Path, *, room: bool
) -> tuple[list[CheckpointEvent], list[CheckpointEvent]]:
    run = Run(folder, "ddp", retry_seconds=0.0)
    run.step(1)
    if rank == 1:
        original = rank_share.write_file
        rank_share.write_file = lambda *_: (_ for _ in ()).throw(
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        )
        if not room:
            rank_share.write_all = lambda *_: (_ for _ in ()).throw(
                OSError(errno.ENOSPC, "No space")
            )
    failed = run.save(1)
    run.step(2)
    if rank == 1:
        rank_share.write_file = original
    dist.barrier()
    again = run.save(2)
    dist.barrier()
    assert run.store.close(SECONDS)
    return failed, again


@pytest.mark.parametrize("room", [True, False])
def test_one_rank_that_fails_fails_the_save_for_all_at_once(room: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    begin = time.monotonic()
    outcome = run_ranks(one_rank_fails_with(room), 2, folder, folder=tmp_path / "a")
    assert time.monotonic() - begin < SECONDS  # not commit_seconds, which are 600
    ((failed,), (again,)) = outcome[0]
    assert failed.state == "failed"
    assert failed.reason.startswith("rank 1: ")
    assert (os.strerror(errno.ENOSPC) in failed.reason) is room
    assert again.state == "candidate"
    assert names(folder) == ["step-00000002"]


def one_rank_fails_with(room: bool) -> Callable[..., Any]:
    return lambda rank, folder: one_rank_fails(rank, folder, room=room)


def one_rank_is_silent(rank: int, folder: Path) -> list[CheckpointEvent]:
    run = Run(folder, "ddp", commit_seconds=0.3)
    events: list[CheckpointEvent] = []
    if rank == 0:
        events = run.save(1)
    dist.barrier()
    return events


def test_a_rank_that_never_writes_its_share_is_named(tmp_path: Path) -> None:
    ((event,), _) = run_ranks(one_rank_is_silent, 2, tmp_path / "c", folder=tmp_path / "a")
    assert event.state == "failed" and numbers_in(event.reason) == [1]
    assert names(tmp_path / "c") == []


def drifted(rank: int, folder: Path) -> tuple[list[CheckpointEvent], dict[str, str]]:
    run = Run(folder, "ddp")
    run.step(1)
    with torch.no_grad():
        run.inner.norm.bias += rank * 1e-6
    events = run.save(1)
    dist.barrier()
    return events, run.store.load(folder / "step-00000001").checks


def test_replicas_that_have_drifted_apart_are_told_of(tmp_path: Path) -> None:
    ((events, checks), _) = run_ranks(drifted, 2, tmp_path / "c", folder=tmp_path / "a")
    assert events[0].state == "candidate"
    assert numbers_in(events[0].reason) == [1, 0] and " weights " in events[0].reason
    assert read_manifest(tmp_path / "c" / "step-00000001").warning == events[0].reason
    assert checks["moments"] == "ok"


# -- the background thread -------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the save, whatever training does to model, ring and extra
    meanwhile.
    """
    straight = Run(tmp_path / "straight")
    straight.steps(1, 4)
    straight.save(3)
    gate, write = threading.Event(), rank_share.write_file
    monkeypatch.setattr(rank_share, "write_file", lambda *a: (gate.wait(SECONDS), write(*a))[1])
    run = Run(tmp_path / "busy")
    run.steps(1, 4)
    run.store.save(run.take(3))
    for step in range(4, 12):
        run.step(step)
        run.take(step)
    assert run.store.busy and run.store.take_events() == []
    assert not run.store.wait(0.01)
    gate.set()
    assert run.store.wait(SECONDS)
    assert whole(tmp_path / "busy" / "step-00000003") == whole(
        tmp_path / "straight" / "step-00000003"
    )


def test_a_newer_save_takes_the_place_of_one_that_still_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, write = threading.Event(), threading.Event(), rank_share.write_file

    def slow(*arguments: Any) -> Any:
        begun.set()
        gate.wait(SECONDS)
        return write(*arguments)

    monkeypatch.setattr(rank_share, "write_file", slow)
    run = Run(tmp_path)
    snapshots = []
    for step in (1, 2, 3):
        snapshots.append(run.take(step))
        run.store.save(snapshots[-1])
        assert begun.wait(SECONDS)
    assert [snapshot.pinned for snapshot in snapshots] == [True, False, True]
    gate.set()
    assert run.store.wait(SECONDS)
    events = run.store.take_events()
    assert [(event.state, event.step) for event in events] == [
        ("candidate", 1),
        ("failed", 2),
        ("candidate", 3),
    ]
    assert events[1].reason.startswith("superseded") and not run.store.degraded
    assert not any(snapshot.pinned for snapshot in snapshots)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_snapshot_that_left_the_ring_is_not_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    gone = run.take(1)
    run.ring.drop_after(0)
    with pytest.raises(ValueError, match=r"step 1\b"):
        run.store.save(gone)


def test_close_ends_the_thread_and_sweeps(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.store.save(run.take(1))
    assert run.store.close(SECONDS) and run.store.close(SECONDS)
    assert writers() == []
    assert names(tmp_path) == ["step-00000001"]


def test_temporary_folders_of_dead_writers_are_removed_at_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    for name in (f"{TEMPORARY}dead-000001-step-00000009", f"{TEMPORARY}dead-gone-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    Run(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_a_step_that_is_saved_again_replaces_nothing(tmp_path: Path) -> None:
    """After a restart on a newer timeline the name may be taken; there is never a moment without
    the old one.
    """
    run = Run(tmp_path)
    run.step(1)
    run.save(1)
    run.step(2)
    assert run.save(1, 2)[0].name == "step-00000001-t2"
    assert run.save(1, 2)[0].name == "step-00000001-t2-2"
    assert run.save(7, 3)[0].name == "step-00000007"
    order = ["step-00000007", "step-00000001-t2-2", "step-00000001-t2", "step-00000001"]
    assert [path.name for path in checkpoint_dirs(tmp_path)] == order
    assert all(verify(path) for path in checkpoint_dirs(tmp_path))


def test_sigkill_at_any_moment_leaves_valid_checkpoints_or_none(tmp_path: Path) -> None:
    """Case 17, law 5: whatever is called a checkpoint holds, and the newest one that was reported
    is there.
    """
    chance = random.Random(11)
    for trial in range(20):
        folder = tmp_path / f"run-{trial}"
        reported = killed_writer(folder, after=chance.uniform(0.0, 0.12))
        found = checkpoint_dirs(folder)
        for path in found:
            verify(path)
        assert {f"step-{step:08d}" for step in reported} <= {path.name for path in found}
        run = Run(folder)
        assert all(not name.startswith(TEMPORARY) for name in names(folder))
        assert run.store.find_newest_valid().path == (found[0] if found else None)
        if found:
            assert run.store.load(found[0]).checks == ALL_OK


def killed_writer(folder: Path, *, after: float) -> list[int]:
    """Fork a process that saves step after step; kill it `after` seconds into that. The steps it
    had reported.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            run = Run(folder)
            os.write(write, b"0")
            for step in range(1, 100):
                run.step(step)
                os.write(write, bytes([event.step for event in run.save(step)]))
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"0"
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(read, "rb") as stream:
        return list(stream.read())


# -- states and retention --------------------------------------------------------------------------


def info(step: int, state: str = GOOD, timeline: int = 0) -> SnapshotInfo:
    return SnapshotInfo(
        step=step,
        cursor=step,
        timeline=timeline,
        tier="disk",
        state=state,
        path=f"{timeline}/{step}",
    )


C, G, S, X = CANDIDATE, GOOD, SUSPECT, INVALID


@pytest.mark.parametrize(
    ("held", "now", "delay", "going"),
    [
        # Nothing goes before there are enough good ones, the oldest least of all.
        ([], 0, 100, []),
        ([(0, G)], 0, 100, []),
        ([(0, G), (100, C)], 105, 100, []),
        ([(0, G), (100, G), (200, C)], 205, 1000, []),
        # The initial one stays until an older-than-delay one can take its place.
        ([(0, G), (100, G), (200, G), (300, G)], 308, 1000, [100]),
        ([(0, G), (100, G), (200, G), (300, G)], 308, 250, []),
        ([(0, G), (100, G), (200, G), (300, G), (400, G)], 408, 350, [200]),
        ([(0, G), (100, G), (200, G), (300, G)], 308, 208, [0]),
        ([(0, G), (100, G), (200, G), (300, G)], 308, 100, [0, 100]),
        ([(0, G), (100, G), (200, G), (300, G)], 308, 0, [0, 100]),
        # A newer one that is not good yet displaces nothing.
        ([(0, G), (100, G), (200, C)], 201, 0, []),
        ([(0, G), (100, G), (200, G), (300, C)], 301, 0, [0]),
        # Suspects and invalid ones go only when there are enough good ones.
        ([(0, G), (100, S), (200, C)], 205, 0, []),
        ([(0, G), (100, G), (200, S), (300, X)], 305, 1000, [200, 300]),
        ([(0, S), (100, S)], 105, 0, []),
        # A candidate older than the newest good one will not be needed.
        ([(0, G), (50, C), (100, G)], 105, 1000, [50]),
    ],
)
def test_retention(held: list[tuple[int, str]], now: int, delay: int, going: list[int]) -> None:
    infos = [info(step, state) for step, state in held]
    assert [i.step for i in find_superfluous(infos, keep=2, now=now, delay=delay)] == going


@pytest.mark.parametrize(("every", "delay"), [(5, 36), (50, 449), (200, 300), (1000, 10)])
def test_there_is_always_one_that_is_old_enough_and_not_much_older(every: int, delay: int) -> None:
    held: list[SnapshotInfo] = []
    for now in range(0, 100 * every + 1, every):
        held.append(info(now))
        held = [i for i in held if i not in find_superfluous(held, keep=2, now=now, delay=delay)]
        newest_old = max((i.step for i in held if i.step <= now - delay), default=0)
        assert now - newest_old <= 2 * (delay + every)
        assert len(held) <= 4


def test_retention_counts_by_timeline_first() -> None:
    infos = [
        info(100),
        info(200, S),
        info(120, timeline=1),
        info(140, timeline=1),
        info(150, C, timeline=1),
    ]
    assert find_superfluous(infos, keep=2, now=151, delay=100) == [info(200, S)]


def test_the_last_good_one_is_never_among_those_that_go() -> None:
    chance = random.Random(3)
    for _ in range(2000):
        steps = sorted(chance.sample(range(0, 1000, 10), chance.randint(0, 8)))
        infos = [info(step, chance.choice([C, G, S, X])) for step in steps]
        keep, now = chance.randint(2, 4), 1000
        going = find_superfluous(infos, keep=keep, now=now, delay=chance.choice([0, 300, 2000]))
        good = [i for i in infos if i.state == GOOD]
        assert not set(good[-keep:]) & set(going)
        if going:
            assert len(good) >= keep


@pytest.mark.fault("T1")
def test_while_an_incident_is_not_over_the_good_ones_stay_and_of_the_candidates_only_the_newest() -> (
    None
):
    # 300 was not yet good at the onset, 350
    held = [info(step, G) for step in (0, 100, 200)] + [info(300, C)]
    for step in range(400, 2001, 100):
        held.append(info(step, C))
        going = find_superfluous(held, keep=2, now=step, delay=250, since=350)
        held = [one for one in held if one not in going]
    assert [(one.step, one.state) for one in held] == [
        (100, G),
        (200, G),
        (300, C),
        (1900, C),
        (2000, C),
    ]


@pytest.mark.fault("T1")
def test_good_ones_from_within_an_incident_are_candidates_again(tmp_path: Path) -> None:
    store = three_saves(tmp_path).store
    store.confirm(lambda step: True)
    assert [one.step for one in store.withdraw_good(2)] == [2, 3] and store.withdraw_good(2) == []
    assert [one.state for one in store.infos()] == [G, C, C]


def test_states_follow_the_steps(tmp_path: Path) -> None:
    run = three_saves(tmp_path)
    store = run.store
    assert [i.step for i in store.confirm(lambda step: step <= 2)] == [1, 2]
    assert store.confirm(lambda step: step <= 2) == []
    assert [i.step for i in store.mark_suspect(2)] == [2, 3]
    assert [(i.step, i.state, i.tier) for i in store.infos()] == [
        (1, G, "disk"),
        (2, S, "disk"),
        (3, S, "disk"),
    ]
    again = CheckpointStore(tmp_path, run.state)
    assert {i.state for i in again.infos()} == {CANDIDATE}
    flip(tmp_path / "step-00000003" / MANIFEST)
    again = CheckpointStore(tmp_path, run.state)
    again.set_states({"step-00000001": GOOD, "step-00000003": GOOD, "gone": GOOD})
    assert [i.state for i in again.infos() if i.step == 1] == [GOOD]
    assert [i.state for i in again.infos() if i.step == 3] == [INVALID]


@pytest.mark.fault("A9")
def test_a_save_that_is_under_way_when_its_state_becomes_suspect_is_committed_as_suspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = threading.Event(), rank_share.write_file
    monkeypatch.setattr(rank_share, "write_file", lambda *a: (gate.wait(SECONDS), write(*a))[1])
    run = Run(tmp_path)
    run.steps(1, 4)
    run.store.save(run.take(3))
    assert run.store.mark_suspect(2) == []
    gate.set()
    assert run.store.wait(SECONDS)
    assert [event.state for event in run.store.take_events()] == [SUSPECT]
    later = Run(tmp_path)  # another process, which the journal tells nothing of it
    assert [(info.step, info.state) for info in later.store.infos()] == [(3, SUSPECT)]


def test_pruning_deletes_in_the_background_and_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2, delay_steps=0)
    for step in range(1, 5):
        run.save(step)
    run.store.prune(4)
    assert len(names(tmp_path)) == 4
    run.store.confirm(lambda step: True)
    run.store.prune(4)
    assert run.store.wait(SECONDS)
    assert [(event.state, event.name) for event in run.store.take_events()] == [
        ("pruned", "step-00000001"),
        ("pruned", "step-00000002"),
    ]
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert [i.step for i in run.store.infos()] == [3, 4]


@pytest.mark.fault("C1")
def test_pruning_reads_no_file_on_the_thread_of_the_training_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    check = checkpoints_module.verify
    monkeypatch.setattr(
        checkpoints_module,
        "verify",
        lambda *a, **n: (readers.append(threading.current_thread().name), check(*a, **n))[1],
    )
    run = Run(tmp_path, keep=2)
    for step in range(1, 5):
        run.save(step)
    run.store.set_states(dict.fromkeys(names(tmp_path), GOOD))
    run.store.prune(4)
    assert run.store.wait(SECONDS)
    assert [event.state for event in run.store.take_events()] == ["pruned", "pruned"]
    assert readers and set(readers) == {"guardrail-checkpoints"}


def test_a_damaged_good_one_keeps_no_other_from_staying(tmp_path: Path) -> None:
    """The last good checkpoint rotated out by newer ones that are worth nothing
    (pocket-tts#262).
    """
    run = Run(tmp_path, keep=2)
    for step in range(1, 5):
        run.save(step)
    run.store.confirm(lambda step: True)
    damaged = tmp_path / "step-00000004" / "rank-00000.safetensors"
    whole = damaged.stat().st_size
    cut_off(damaged)
    left = damaged.stat().st_size
    run.store.prune(4)
    assert run.store.wait(SECONDS)
    events = run.store.take_events()
    assert [(event.state, event.name) for event in events] == [
        ("invalid", "step-00000004"),
        ("pruned", "step-00000001"),
        ("pruned", "step-00000004"),
    ]
    assert "step-00000004/rank-00000.safetensors" in events[0].reason
    assert sorted(numbers_in(events[0].reason)) == [left, whole]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_deletion_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardrail.torch.checkpoint import disk_checkpoints as checkpoints

    run = Run(tmp_path, keep=2)
    for step in range(1, 4):
        run.save(step)
    run.store.confirm(lambda step: True)
    fails_once(
        monkeypatch,
        checkpoints,
        "remove_checkpoint",
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    )
    run.store.prune(3)
    assert run.store.wait(SECONDS)
    (event,) = run.store.take_events()
    assert event.state == "failed" and event.reason.endswith(os.strerror(errno.EACCES))
    assert not run.store.degraded
    run.store.prune(3)
    assert run.store.wait(SECONDS)
    assert [event.state for event in run.store.take_events()] == ["pruned"]


def test_keeping_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Run(tmp_path, keep=1)
