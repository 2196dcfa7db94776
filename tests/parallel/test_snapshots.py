from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guardrail.torch.checkpoint import memory_snapshots as snapshots_module
from guardrail.torch.checkpoint.memory_snapshots import SnapshotRing
from guardrail.torch.checkpoint.snapshot_layout import SnapshotLayout
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD
from guardrail.torch.state.training_state import TrainingState
from tests.support.ranks import run_ranks
from tests.support.tiny import Setup


def healthy_through(last: int, confirm: int) -> Callable[[int], bool]:
    """Of a run that is healthy up to step `last`: whether the state after a step is good."""
    return lambda step: step + confirm <= last


def ring_of(setup: Setup, keep: int = 3) -> SnapshotRing:
    return SnapshotRing(TrainingState(setup.model, setup.optimizers, setup.schedulers), keep)


def steps_of(ring: SnapshotRing, state: str | None = None) -> list[int]:
    return [info.step for info in ring.infos() if state in (None, info.state)]


# -- exactness (law 3) -----------------------------------------------------------------------------


def rolled_back(rank: int, kind: str, optimizer: str) -> None:
    """Good steps, bad steps, back: bit-identical to a run that never had the bad ones, twice
    over.
    """
    straight = Setup(kind, optimizer)
    losses = straight.steps(1, 4) + straight.steps(5, 9)
    expected = TrainingState(straight.model, straight.optimizers, straight.schedulers).digests()

    run = Setup(kind, optimizer)
    ring = ring_of(run)
    seen = run.steps(1, 4)
    snapshot = ring.take(3, 24, 0, {"cursor": 24})
    run.steps(100, 103, bad=True)
    assert ring.restore(snapshot) == {"cursor": 24}
    seen += run.steps(5, 7)
    run.step(200, bad=True)
    ring.restore(snapshot)
    seen[3:] = run.steps(5, 9)
    assert seen == losses
    assert ring.state.digests() == expected


ALONE = [
    "adamw",
    "adamw-foreach",
    "adamw-fused",
    "tensor-lr",
    "sgd",
    "momentum",
    "adafactor",
    "groups",
    "muon+adamw",
]


@pytest.mark.parametrize("optimizer", ALONE)
def test_rollback_is_exact_on_one_rank(optimizer: str) -> None:
    rolled_back(0, "plain", optimizer)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused", "muon+adamw"])
def test_rollback_is_exact_on_two_ranks(kind: str, optimizer: str, tmp_path: Path) -> None:
    run_ranks(rolled_back, 2, kind, optimizer, folder=tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw-fused", "momentum", "muon+adamw"])
def test_back_to_before_the_first_step(optimizer: str) -> None:
    run = Setup(optimizer=optimizer)
    ring = ring_of(run)
    new = ring.take(0, 0, 0, {})
    first = run.steps(1, 5)
    warm = ring.take(4, 32, 0, {})
    digests = ring.state.digests()
    ring.restore(new)
    assert not any(name.startswith("optim/") for name in ring.state.tensors())
    assert run.steps(1, 5) == first
    ring.restore(new)
    ring.restore(warm)  # into an optimizer without state
    assert ring.state.digests() == digests


def test_optimizer_tensors_that_were_replaced_are_found_again() -> None:
    run = Setup()
    ring = ring_of(run)
    run.steps(1, 3)
    snapshot = ring.take(2, 16, 0, {})
    digests = ring.state.digests()
    run.step(3)
    # puts new tensors in the place of the old
    run.optimizers[0].load_state_dict(run.optimizers[0].state_dict())
    ring.restore(snapshot)
    assert ring.state.digests() == digests


def test_memory_format_and_odd_types_come_back_bit_by_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    model.register_buffer(
        "small", torch.tensor([1.0, math.nan, -0.0, math.inf], dtype=torch.bfloat16)
    )
    model.register_buffer("mask", torch.tensor([[True, False], [False, True]]).t())
    model.register_buffer("none", torch.zeros(0, 3))
    model.register_buffer("slice", torch.arange(20.0)[::2])
    model.register_buffer("nothing", None)
    ring = SnapshotRing(TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1)), 2)
    before = ring.state.digests()
    snapshot = ring.take(1, 1, 0, {})
    assert snapshot.tensors["model/0.weight"].stride() == model[0].weight.stride()
    with torch.no_grad():
        for tensor in ring.state.tensors().values():
            tensor.fill_(1)
    assert ring.state.digests() != before
    ring.restore(snapshot)
    assert ring.state.digests() == before


# -- what is in a snapshot stays as it was ---------------------------------------------------------


def test_nothing_that_happens_later_changes_a_snapshot() -> None:
    run = Setup()
    ring = ring_of(run)
    run.steps(1, 3)
    extra: dict[str, Any] = {"detector": {"window": [1.0, 2.0], "last": math.inf}, "spans": []}
    snapshot = ring.take(2, 16, 0, extra)
    tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    scalars = repr(snapshot.scalars)
    extra["detector"]["window"].append(3.0)
    extra["spans"].append("x")
    snapshot.extra["spans"].append("y")
    ring.restore(snapshot)["detector"]["window"].clear()
    run.steps(3, 6)
    run.optimizers[0].param_groups[0]["lr"] = 7.0
    ring.take(5, 40, 0, {})
    assert snapshot.extra == {"detector": {"window": [1.0, 2.0], "last": math.inf}, "spans": []}
    assert repr(snapshot.scalars) == scalars
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in snapshot.tensors.items())


def test_extra_that_is_not_json_is_refused_before_anything_is_evicted() -> None:
    run = Setup()
    ring = ring_of(run, keep=2)
    ring.take(1, 8, 0, {})
    ring.take(2, 16, 0, {})
    with pytest.raises(TypeError):
        ring.take(3, 24, 0, {"bad": {1, 2}})
    assert steps_of(ring) == [1, 2]


# -- buffers ---------------------------------------------------------------------------------------


def places(ring: SnapshotRing) -> set[int]:
    return {ring.get(step).tensors["model/embed.weight"].data_ptr() for step in steps_of(ring)}  # type: ignore[union-attr]


def test_a_full_ring_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Setup()
    ring = ring_of(run, keep=3)
    run.step(1)
    for step in range(1, 4):
        ring.take(step, step, 0, {})
    before = places(ring)
    monkeypatch.setattr(SnapshotLayout, "allocate", lambda self: pytest.fail("allocated"))
    for step in range(4, 9):
        ring.take(step, step, 0, {})
        assert places(ring) == before
    ring.drop_after(5)
    for step in range(6, 12):  # what was dropped is used again too
        ring.take(step, step, 0, {})
    assert places(ring) == before


def test_a_snapshot_being_written_keeps_its_buffers() -> None:
    run = Setup()
    ring = ring_of(run, keep=2)
    run.step(1)
    writing = ring.take(1, 8, 0, {})
    content = writing.tensors["model/embed.weight"].clone()
    writing.pin()
    for step in range(2, 7):
        run.step(step)
        ring.take(step, 8 * step, 0, {})
    assert steps_of(ring) == [5, 6] and ring.get(1) is None
    assert torch.equal(writing.tensors["model/embed.weight"], content)
    place = writing.tensors["model/embed.weight"].data_ptr()
    writing.release()
    assert not writing.pinned
    for step in range(7, 10):
        ring.take(step, 8 * step, 0, {})
    assert len(places(ring) | {place}) <= 3
    with pytest.raises(ValueError, match=r"step 1\b"):
        ring.restore(writing)


@pytest.mark.fault("C6")
def test_no_step_allocates_a_buffer_in_place_of_one_that_a_slow_writer_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshots_module, "_AHEAD_BYTES", 0, raising=False)
    run = Setup()
    ring = ring_of(run, keep=3)
    run.step(1)
    for step in range(1, 4):
        ring.take(step, step, 0, {})
    allocate, step_thread = SnapshotLayout.allocate, threading.current_thread()

    def checked(self: SnapshotLayout) -> list[torch.Tensor]:
        assert threading.current_thread() is not step_thread, "the step waits for fresh memory"
        return allocate(self)

    monkeypatch.setattr(SnapshotLayout, "allocate", checked)
    seen: set[int] = set()
    step = 3
    for _ in range(3):  # one save is being written and another one waits; then both are done
        writing = []
        for _ in range(9):
            step += 1
            snapshot = ring.take(step, step, 0, {})
            seen.add(snapshot.tensors["model/embed.weight"].data_ptr())
            if len(writing) < 2 and step % 2:
                snapshot.pin()
                writing.append((snapshot, snapshot.tensors["model/embed.weight"].clone()))
        for held, content in writing:
            assert torch.equal(held.tensors["model/embed.weight"], content)
            held.release()
    assert len(seen) <= 3 + 2, "buffers that a writer gave back are used again"


def test_a_snapshot_that_left_the_ring_is_not_restored() -> None:
    """Its buffers may hold a later step by now."""
    run = Setup()
    ring = ring_of(run, keep=2)
    gone = ring.take(1, 8, 0, {})
    before = ring.state.digests()
    ring.drop_after(0)
    with pytest.raises(ValueError, match=r"step 1\b"):
        ring.restore(gone)
    assert ring.state.digests() == before


def test_bytes_are_those_of_the_tensors() -> None:
    run = Setup(optimizer="momentum")
    run.step(1)
    snapshot = ring_of(run).take(1, 8, 0, {})
    numbers = sum(p.numel() for p in run.model.parameters())
    assert snapshot.bytes == 4 * (2 * numbers + 3)
    assert snapshot.info().tier == "memory" and snapshot.info().bytes == snapshot.bytes


# -- states: pure functions of steps ---------------------------------------------------------------


def test_good_after_enough_healthy_steps() -> None:
    ring = ring_of(Setup(), keep=4)
    for step in (0, 10, 20):
        ring.take(step, step, 0, {})
    assert [s.step for s in ring.confirm(healthy_through(17, 8))] == [0]
    assert [s.step for s in ring.confirm(healthy_through(18, 8))] == [10]
    assert ring.confirm(healthy_through(18, 8)) == []
    assert [(info.step, info.state) for info in ring.infos()] == [
        (0, GOOD),
        (10, GOOD),
        (20, CANDIDATE),
    ]
    assert ring.newest_good().step == 10  # type: ignore[union-attr]
    assert ring.newest_good(before_step=10).step == 0  # type: ignore[union-attr]
    assert ring.newest_good(before_step=0) is None


def test_later_snapshots_are_dropped() -> None:
    ring = ring_of(Setup(), keep=4)
    for step in (0, 10, 20, 30):
        ring.take(step, step, 0, {})
    ring.drop_after(10)
    assert steps_of(ring) == [0, 10]


def test_the_newest_good_one_outlives_any_number_of_candidates() -> None:
    ring = ring_of(Setup(), keep=3)
    ring.take(0, 0, 0, {})
    ring.confirm(healthy_through(8, 8))
    for step in range(10, 100, 10):
        ring.take(step, step, 0, {})
        assert ring.newest_good().step == 0  # type: ignore[union-attr]
    assert steps_of(ring) == [0, 80, 90]
    ring.confirm(healthy_through(98, 8))
    ring.take(100, 100, 0, {})
    assert steps_of(ring) == [80, 90, 100]
    assert ring.newest_good().step == 90  # type: ignore[union-attr]


def test_the_same_step_again_takes_the_place_of_the_old() -> None:
    run = Setup()
    ring = ring_of(run, keep=3)
    ring.take(10, 80, 0, {"timeline": 0})
    ring.take(20, 160, 0, {})
    again = ring.take(10, 88, 1, {"timeline": 1})
    assert steps_of(ring) == [10, 20]
    assert ring.get(10) is again and again.extra == {"timeline": 1} and again.info().cursor == 88


def test_every_candidate_can_become_good_within_the_reach_that_the_configuration_promises() -> None:
    """config: confirm <= every * (keep - 1)."""
    every, keep = 10, 2
    ring = ring_of(Setup(), keep=keep)
    for step in range(101):
        ring.confirm(healthy_through(step, every * (keep - 1)))
        if step % every == 0:
            ring.take(step, step, 0, {})
        if step >= every:
            assert ring.newest_good().step == (step // every - 1) * every  # type: ignore[union-attr]


def test_a_ring_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="ring"):
        ring_of(Setup(), keep=1)
