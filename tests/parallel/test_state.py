from __future__ import annotations

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

from guardrail.core.errors import CheckpointInvalid, UsageError
from guardrail.torch.state import json_codec as plain
from guardrail.torch.state.digests import component_digests
from guardrail.torch.state.training_state import TrainingState
from tests.support.ranks import run_ranks
from tests.support.tiny import OPTIMIZERS, Setup, Tiny

WEIGHTS = {
    "model/embed.weight",
    "model/blocks.0.linear.weight",
    "model/blocks.0.linear.bias",
    "model/blocks.1.linear.weight",
    "model/blocks.1.linear.bias",
    "model/norm.weight",
    "model/norm.bias",
    "buffer/seen",
}


def state_of(setup: Setup) -> TrainingState:
    return TrainingState(setup.model, setup.optimizers, setup.schedulers)


def saved(state: TrainingState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}, state.scalars()


def kinds(optimizers: list[torch.optim.Optimizer]) -> list[Any]:
    """Type, dtype, device and shape of everything in the optimizers' states, in the order of the
    parameters.
    """
    return [
        {
            k: (type(v), v.dtype, v.device, v.shape) if isinstance(v, torch.Tensor) else v
            for k, v in o.state[p].items()
        }
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
        if p in o.state
    ]


def test_names_hold_tied_parameters_once_and_persistent_buffers_only() -> None:
    setup = Setup(optimizer="momentum")
    assert set(state_of(setup).tensors()) == WEIGHTS
    setup.step(1)
    moments = {
        f"optim/{name.removeprefix('model/')}/momentum_buffer"
        for name in WEIGHTS
        if name.startswith("model/")
    }
    assert set(state_of(setup).tensors()) == WEIGHTS | moments


def test_names_do_not_know_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Tiny()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    compiled = torch.compile(model, backend="eager")
    state = TrainingState(compiled, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    assert set(state.tensors()) == WEIGHTS
    assert state.names[id(model.embed.weight)] == "embed.weight"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loading_into_a_new_model_goes_on_bit_by_bit(optimizer: str) -> None:
    run = Setup(optimizer=optimizer)
    run.steps(1, 4)
    state = state_of(run)
    tensors, scalars = saved(state)
    going_on = run.steps(4, 8)

    other = Setup(optimizer=optimizer, seed=99)
    parameters = list(other.model.parameters())
    resumed = state_of(other)
    resumed.load(tensors, scalars)
    assert component_digests(tensors, scalars) == resumed.digests()
    assert other.steps(4, 8) == going_on
    assert state.digests() == resumed.digests()
    assert kinds(run.optimizers) == kinds(other.optimizers)
    assert all(a is b for a, b in zip(parameters, other.model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_from_before_the_first_step_makes_the_optimizer_new_again(optimizer: str) -> None:
    run = Setup(optimizer=optimizer)
    state = state_of(run)
    tensors, scalars = saved(state)
    first = run.steps(1, 5)
    digests = state.digests()
    state.load(tensors, scalars)
    assert not any(name.startswith("optim/") for name in state.tensors())
    assert run.steps(1, 5) == first
    assert state.digests() == digests


def saved_at_step_3() -> tuple[Setup, TrainingState, tuple[dict[str, torch.Tensor], Any]]:
    """Return a run after two steps, its state, and a copy of that state."""
    run = Setup()
    run.steps(1, 3)
    state = state_of(run)
    return run, state, saved(state)


def test_load_leaves_gradients_alone_and_copies_in_place() -> None:
    run, state, (tensors, scalars) = saved_at_step_3()
    run.step(3)
    before = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    gradient = torch.ones_like(run.inner.norm.weight)
    run.inner.norm.weight.grad = gradient
    state.load(tensors, scalars)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == before
    assert run.inner.norm.weight.grad is gradient and bool((gradient == 1).all())


def test_surplus_state_is_deleted() -> None:
    run = Setup(optimizer="momentum")
    state = state_of(run)
    run.step(1)
    tensors, scalars = saved(state)
    run.optimizers[0].state[run.inner.norm.bias]["invented"] = torch.zeros(3)
    run.optimizers[0].state[run.inner.norm.bias]["number"] = 3
    state.load(tensors, scalars)
    assert set(run.optimizers[0].state[run.inner.norm.bias]) == {"momentum_buffer"}


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_touched() -> None:
    run, state, (tensors, scalars) = saved_at_step_3()
    run.step(3)
    before = state.digests()

    def refused(change: dict[str, torch.Tensor | None]) -> str:
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        with pytest.raises(CheckpointInvalid) as caught:
            state.load(changed, scalars)
        assert state.digests() == before
        return str(caught.value)

    assert "model/norm.bias is missing" in refused({"model/norm.bias": None})
    longer = refused({"model/norm.bias": torch.zeros(7)})
    assert longer.index("model/norm.bias") < longer.index("float32[7]") < longer.index("float32[6]")
    assert "model/norm.bias is float16[6]" in refused(
        {"model/norm.bias": torch.zeros(6, dtype=torch.float16)}
    )
    assert "model/other " in refused({"model/other": torch.zeros(2)})
    assert "optim/other/exp_avg " in refused({"optim/other/exp_avg": torch.zeros(2)})
    assert "optim/norm.bias/exp_avg is float32[9]" in refused(
        {"optim/norm.bias/exp_avg": torch.zeros(9)}
    )
    many = refused({name: None for name in tensors if name.startswith("model/")})
    assert many.count("is missing") == 3 and many.endswith("and 4 more")


def test_numbers_of_other_groups_or_schedules_are_refused() -> None:
    run = Setup(optimizer="groups")
    tensors, scalars = saved(state_of(run))
    other = Setup(optimizer="adamw")
    with pytest.raises(CheckpointInvalid) as caught:
        state_of(other).load(tensors, scalars)
    assert caught.value.kind == "other_groups"
    without = TrainingState(other.model, other.optimizers)
    with pytest.raises(CheckpointInvalid, match=r" 1 schedulers, .* 0 "):
        without.load(tensors, scalars)


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [3, 3, 6], gamma=0.5),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 20)],
        [3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_goes_on_where_it_was(schedule: str) -> None:
    """Case 5: learning rates reset to warm-up or to their first value on resume."""

    def build() -> tuple[torch.optim.Optimizer, Any, TrainingState]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = SCHEDULES[schedule](optimizer)
        return optimizer, scheduler, TrainingState(model, optimizer, scheduler)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[float]:
        seen = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("betas")))
        return seen

    optimizer, scheduler, state = build()
    rates(optimizer, scheduler, 5)
    scalars = state.scalars()
    expected = rates(optimizer, scheduler, 12)
    again, schedule_again, other = build()
    other.load_scalars(scalars)
    assert again.param_groups[0]["lr"] == plain.decode(scalars["groups"][0][0]["values"])["lr"]
    assert rates(again, schedule_again, 12) == expected


def test_plateau_schedule_keeps_its_infinities() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    state = TrainingState(model, optimizer, scheduler)
    scalars = state.scalars()
    scheduler.step(1.0)
    state.load_scalars(scalars)
    assert scheduler.best == math.inf


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    run = Setup(optimizer="tensor-lr")
    state = state_of(run)
    rate = run.optimizers[0].param_groups[0]["lr"]
    scalars = state.scalars()
    run.step(1)
    assert rate.item() != pytest.approx(0.01, rel=1e-9)
    state.load_scalars(scalars)
    assert run.optimizers[0].param_groups[0]["lr"] is rate
    assert rate.item() == torch.tensor(0.01).item()


def test_how_to_compute_is_not_restored() -> None:
    run = Setup(optimizer="adamw-fused")
    run.step(1)
    tensors, scalars = saved(state_of(run))
    other = Setup(optimizer="adamw")
    state_of(other).load(tensors, scalars)
    assert not other.optimizers[0].param_groups[0]["fused"]


def test_the_loss_scale_travels_along() -> None:
    """Case 4: a scaler that restarts at 65536 overflows, and the schedule gets a kink."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model = nn.Linear(2, 2)

    def build(scale: float) -> TrainingState:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))  # its tensor is made lazily
        return TrainingState(
            model, AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
        )

    scalars = build(256.0).scalars()
    state = build(65536.0)
    state.load_scalars(scalars)
    assert state.scalars()["scalers"][0]["scale"] == 256.0


def test_what_accelerate_prepares_is_unwrapped() -> None:
    from accelerate import Accelerator

    run = Setup()
    model, optimizer, scheduler = Accelerator(cpu=True).prepare(
        run.model, run.optimizers[0], run.schedulers[0]
    )
    state = TrainingState(model, optimizer, scheduler)
    assert set(state.tensors()) == WEIGHTS
    assert state.optimizers == run.optimizers and state.schedulers == run.schedulers


def test_what_could_not_be_restored_is_refused_at_once() -> None:
    model, stranger = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"^SGD .*\(2, 2\)"):
        TrainingState(model, torch.optim.SGD(stranger.parameters(), lr=0.1))
    twice = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(UsageError, match=r"^weight "):
        TrainingState(model, twice)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    scheduler.note = object()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"LambdaLR\.note holds object"):
        TrainingState(model, optimizer, scheduler)
    model.register_buffer("mask", torch.ones(1).expand(4))
    with pytest.raises(UsageError, match=r"^buffer mask .*clone\(\)"):
        TrainingState(model, optimizer)


def test_digests_name_the_component_that_differs() -> None:
    """Case 7: which of weights, moments, schedule is it."""
    run = Setup()
    run.step(1)
    state = state_of(run)

    def differing(change: Any) -> set[str]:
        tensors, scalars = saved(state)
        before = state.digests()
        change()
        after = state.digests()
        state.load(tensors, scalars)
        assert state.digests() == before
        return {name for name in before if before[name] != after[name]}

    def flip(tensor: torch.Tensor) -> None:
        tensor.detach().view(torch.uint8)[..., 0] ^= 1

    moments = run.optimizers[0].state[run.inner.norm.bias]
    assert differing(lambda: flip(run.inner.norm.weight)) == {"weights"}
    assert differing(lambda: flip(moments["exp_avg"])) == {"moments"}
    assert differing(lambda: moments["step"].add_(1)) == {"moments"}
    assert differing(lambda: run.schedulers[0].step()) == {"schedule"}
    assert differing(lambda: flip(run.inner.seen)) == {"buffers"}
    assert differing(lambda: None) == set()


def test_whether_an_optimizer_keeps_tensors_is_found_out_without_touching_it() -> None:
    class SignSGD(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})
            self.calls = [0]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad.sign(), alpha=group["lr"])

    class Unknowable(SignSGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("only with a closure")

    model = nn.Linear(2, 2)
    hooked = []
    answers = {}
    for kind in (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD, SignSGD, Unknowable):
        optimizer = kind(model.parameters())  # type: ignore[call-arg]
        optimizer.register_step_post_hook(lambda *_: hooked.append(1))
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
        state = TrainingState(model, optimizer, scheduler)
        before = state.digests()
        answers[kind.__name__] = state.stateless()
        assert state.digests() == before and not optimizer.state and not hooked
    assert answers == {
        "AdamW": False,
        "Adafactor": False,
        "SGD": True,
        "SignSGD": True,
        "Unknowable": None,
    }
    assert (
        TrainingState(model, torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)).stateless()
        is False
    )


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, "text", True],
        (0.9, (1, [2])),
        {1: "a", "b": {2.5: None}},
        {"$float": "not ours"},
        {"$odd": 1, "other": 2},
        Counter({3: 2, 7: 1}),
        [math.inf, -math.inf],
        2**60,
    ],
)
def test_plain_values_survive_json(value: Any) -> None:
    import json

    text = json.dumps(plain.encode(value), allow_nan=False)
    back = plain.decode(json.loads(text))
    assert back == value and type(back) is type(value)


def test_plain_keeps_nan_and_small_tensors() -> None:
    assert math.isnan(plain.decode(plain.encode(math.nan)))
    tensor = plain.decode(plain.encode(torch.tensor([0.1], dtype=torch.bfloat16)))
    assert torch.equal(tensor, torch.tensor([0.1], dtype=torch.bfloat16))
    with pytest.raises(UsageError, match=r"^x\.y\[1\] .* 4 "):
        plain.encode({"y": [0, torch.zeros(4)]}, "x")


# -- sharded ---------------------------------------------------------------------------------------


def sharded_resume(rank: int, optimizer: str) -> None:
    run = Setup("fsdp", optimizer)
    state = state_of(run)
    assert set(state.tensors()) == WEIGHTS
    empty = saved(state)
    run.steps(1, 4)
    full = saved(state)
    boxes = state.boxes()
    going_on = run.steps(4, 7)
    box = boxes["model/embed.weight"]
    assert (
        box.global_shape == (13, 6)
        and box.size == ((7, 6), (6, 6))[rank]
        and box.offset == ((0, 0), (7, 0))[rank]
    )
    assert boxes["buffer/seen"].is_complete

    state.load(*empty)
    assert not any(o.state for o in run.optimizers)
    run.steps(1, 4)
    assert component_digests(state.tensors(), state.scalars()) == component_digests(*full)

    other = Setup("fsdp", optimizer, seed=5)
    resumed = state_of(other)
    resumed.load(*full)
    for mine, theirs in zip(kinds(other.optimizers), kinds(run.optimizers), strict=True):
        assert mine == theirs
    held = [v for o in other.optimizers for s in o.state.values() for v in s.values() if v.ndim]
    assert not held or all(isinstance(v, DTensor) for v in held)
    assert other.steps(4, 7) == going_on


@pytest.mark.parametrize(
    "optimizer", ["adamw-foreach", "adamw-fused", "sgd", "momentum", "muon+adamw"]
)
def test_sharded_state_is_emptied_created_and_goes_on(optimizer: str, tmp_path: Path) -> None:
    run_ranks(sharded_resume, 2, optimizer, folder=tmp_path)


def restored_after_evaluation(rank: int) -> None:
    run = Setup("fsdp")
    state = state_of(run)
    run.steps(1, 3)
    kept = saved(state)
    expected = run.steps(3, 6)
    run.steps(6, 8)
    with torch.no_grad():
        run.model(torch.zeros(1, 4, dtype=torch.int64))
    # The trap is real: the root's parameters are gathered now, and the next forward would use these
    # copies.
    assert not isinstance(run.inner.embed.weight, DTensor)
    assert state_of(run).sharded
    with torch.no_grad():
        run.model(torch.zeros(1, 4, dtype=torch.int64))
    state.load(*kept)
    assert run.steps(3, 6) == expected


def test_a_restore_right_after_an_evaluation_reaches_the_next_forward(tmp_path: Path) -> None:
    run_ranks(restored_after_evaluation, 2, folder=tmp_path)


def mixed(rank: int) -> None:
    """A DTensor model with a plain part beside it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    state = TrainingState(model, optimizer)

    def step() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = saved(state)
    step()
    expected = state.digests()
    state.load(*kept)
    step()
    assert state.digests() == expected
    assert (
        state.boxes()["model/0.weight"].size == (2, 4)
        and state.boxes()["model/1.weight"].is_complete
    )
    assert state.replicas()["model/0.weight"] == (0, 1) and state.replicas()["model/1.weight"] == (
        rank,
        2,
    )


def test_sharded_and_plain_parameters_side_by_side(tmp_path: Path) -> None:
    run_ranks(mixed, 2, folder=tmp_path)


def wrapped_in_ddp(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    run = Setup("ddp")
    assert set(state_of(run).tensors()) == WEIGHTS
    assert state_of(run).replicas()["model/norm.bias"] == (rank, 2)
    old = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    with pytest.raises(UsageError, match="FSDP1"):
        TrainingState(old, torch.optim.SGD(old.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at import
        from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="ZeroRedundancyOptimizer"):
        TrainingState(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))
    dist.barrier()


def test_ddp_is_unwrapped_and_hidden_sharding_refused(tmp_path: Path) -> None:
    run_ranks(wrapped_in_ddp, 2, folder=tmp_path)
