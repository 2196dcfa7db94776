"""The optimizers against their formulas, the schedule against its corners, a scheduler state that
restores exactly.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Muon

from tests.support.ranks import run_ranks
from trainer.config.config import ModelSection, OptimSection
from trainer.config.schedule import Schedule
from trainer.model import Decoder
from trainer.optim.registry import build_optimizers
from trainer.optim.sharded_muon import ShardedMuon
from trainer.stabilisers.scheduler import Scheduler

SECTION = OptimSection(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)


def model(tied: bool = True) -> Decoder:
    return Decoder(
        ModelSection(layers=1, width=8, heads=2, tied=tied),
        vocabulary=11,
        sequence_length=4,
        seed=3,
    )


def gradient(step: int, index: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + index))


def test_updates_are_those_of_the_formula() -> None:
    decoder = model()
    optimizer = build_optimizers(decoder, SECTION)[0]
    expected = {name: p.detach().double().clone() for name, p in decoder.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        for index, (name, parameter) in enumerate(decoder.named_parameters()):
            parameter.grad = gradient(step, index, parameter.shape)
            g = parameter.grad.double()
            decay = 0.3 if parameter.ndim >= 2 else 0.0
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            m, v = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            expected[name] = expected[name] * (1 - 1e-2 * decay) - 1e-2 * m / (v.sqrt() + 1e-6)
        optimizer.step()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(
            parameter.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay_and_every_parameter_stands_once(tied: bool) -> None:
    decoder = model(tied)
    optimizer = build_optimizers(decoder, SECTION)[0]
    names = {id(p): name for name, p in decoder.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name else 0.3), name
    assert decay["embedding.weight"] == 0.3


def test_frozen_parameters_are_left_out_and_empty_groups_too() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    optimizer = build_optimizers(layer, SECTION)[0]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1]


def test_the_same_steps_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        decoder = model()
        optimizer = build_optimizers(decoder, SECTION)[0]
        for step in range(3):
            for index, parameter in enumerate(decoder.parameters()):
                parameter.grad = gradient(step, index, parameter.shape)
            optimizer.step()
        results.append(list(decoder.parameters()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _sharded_steps(rank: int, world: int) -> dict[str, Tensor]:
    decoder = model(tied=False)
    # 11 x 8 and 8 do not divide by 3: uneven and empty shards are among them.
    fully_shard(decoder, mesh=init_device_mesh("cpu", (world,)))
    optimizer = build_optimizers(decoder, SECTION)[0]
    for step in range(3):
        for index, parameter in enumerate(decoder.parameters()):
            assert isinstance(parameter, DTensor)
            whole = gradient(step, index, parameter.shape)
            local = torch.distributed.tensor.distribute_tensor(
                whole, parameter.device_mesh, parameter.placements
            )
            parameter.grad = local
        optimizer.step()
    assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())
    return {name: p.full_tensor().detach() for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_fused_adamw_on_shards_equals_the_whole(world: int, tmp_path: Path) -> None:
    decoder = model(tied=False)
    optimizer = build_optimizers(decoder, SECTION)[0]
    for step in range(3):
        for index, parameter in enumerate(decoder.parameters()):
            parameter.grad = gradient(step, index, parameter.shape)
        optimizer.step()
    for result in run_ranks(_sharded_steps, world, world, folder=tmp_path):
        for name, parameter in decoder.named_parameters():
            # Vectorised and remainder lanes may round differently where the length of a shard
            # differs.
            torch.testing.assert_close(
                result[name], parameter.detach(), rtol=1e-6, atol=1e-7, msg=name
            )


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_adds_its_decay_to_the_gradient_and_adamw_does_not(
    name: str, implementation: str
) -> None:
    section = OptimSection(
        name=name, implementation=implementation, lr=1e-2, weight_decay=0.3, beta2=0.9, eps=1e-6
    )
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().double()
    optimizer = build_optimizers(layer, section)[0]
    layer.weight.grad = gradient(0, 0, layer.weight.shape)
    optimizer.step()
    g = layer.weight.grad.double()
    if name == "adam":
        g, before_step = g + 0.3 * before, before
    else:
        before_step = before * (1 - 1e-2 * 0.3)
    torch.testing.assert_close(
        layer.weight.double(), before_step - 1e-2 * g / (g.abs() + 1e-6), rtol=1e-5, atol=1e-6
    )


def test_adafactor_is_the_formula() -> None:
    """Shazeer & Stern 2018, algorithm 4, with the relative step and decay of torch's
    documentation.
    """
    layer = nn.Linear(5, 3, bias=False)
    optimizer = build_optimizers(layer, OptimSection(name="adafactor", lr=0.05, weight_decay=0.1))[
        0
    ]
    w = layer.weight.detach().double()
    rows, columns = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    for step in range(1, 6):
        layer.weight.grad = gradient(step, 0, layer.weight.shape)
        g = layer.weight.grad.double()
        beta = 1 - step**-0.8
        rate = min(0.05, step**-0.5) * max(1e-3, w.square().mean().sqrt().item())
        rows = beta * rows + (1 - beta) * g.square().mean(1, keepdim=True)
        columns = beta * columns + (1 - beta) * g.square().mean(0, keepdim=True)
        update = g / (rows @ columns / rows.mean()).sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        w = w * (1 - 0.05 * 0.1) - rate * update
        optimizer.step()
        torch.testing.assert_close(layer.weight.double(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(tied: bool) -> None:
    # As wide as the vocabulary, which says nothing about what a matrix is for.
    section = ModelSection(layers=1, width=8, heads=2, hidden=11, tied=tied)
    decoder = Decoder(section, vocabulary=11, sequence_length=4, seed=3)
    muon, adamw = build_optimizers(decoder, OptimSection(name="muon"))
    names = {id(p): name for name, p in decoder.named_parameters()}
    inner = sorted(names[id(p)] for g in muon.param_groups for p in g["params"])
    rest = sorted(names[id(p)] for g in adamw.param_groups for p in g["params"])
    assert inner == [
        name for name in sorted(names.values()) if name.startswith("blocks.") and "norm" not in name
    ]
    assert sorted(inner + rest) == sorted(names.values())


def test_muons_updates_are_orthogonal_and_as_long_as_adamws() -> None:
    layer = nn.Linear(16, 8, bias=False)
    nn.init.zeros_(layer.weight)
    (muon, *_) = build_optimizers(layer, OptimSection(name="muon", lr=0.5, weight_decay=0.0))
    layer.weight.grad = gradient(0, 0, layer.weight.shape)
    muon.step()
    values = torch.linalg.svdvals(layer.weight.detach()) / (0.5 * 0.2 * 16**0.5)
    # five Newton-Schulz iterations come this near to 1
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_is_its_formula_with_the_length_of_adamws_updates() -> None:
    """Jordan et al. 2024 (momentum, Nesterov, five Newton-Schulz iterations), scaled and decayed as
    in Liu et al. 2025.

    torch averages the momentum where the published code sums it: a factor that the iteration
    divides by.
    """
    layer = nn.Linear(16, 8, bias=False)
    section = OptimSection(name="muon", lr=0.1, weight_decay=0.3, momentum=0.9)
    (muon, *_) = build_optimizers(layer, section)
    w, m = layer.weight.detach().double(), torch.zeros(8, 16, dtype=torch.float64)
    for step in range(1, 5):
        layer.weight.grad = gradient(step, 0, layer.weight.shape)
        g = layer.weight.grad.double()
        m = 0.9 * m + g
        x = g + 0.9 * m
        x /= x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        w = w * (1 - 0.1 * 0.3) - 0.1 * 0.2 * math.sqrt(16) * x
        muon.step()
        # torch iterates in bf16, eight bits of which are 0.4 %.
        torch.testing.assert_close(layer.weight.double(), w, rtol=0, atol=0.02 * 0.1 * 0.8 * step)


def test_schedule_at_its_corners() -> None:
    schedule = Schedule.from_section(
        OptimSection(lr=2.0, warmup_steps=10, min_lr_share=0.1), steps=110
    )
    assert schedule(0) == 0.0
    assert schedule(1) == pytest.approx(0.2)
    assert schedule(5) == pytest.approx(1.0)
    assert schedule(10) == 2.0
    assert schedule(60) == pytest.approx(0.2 + 1.8 / 2)
    assert schedule(110) == pytest.approx(0.2)
    assert schedule(5000) == pytest.approx(0.2)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    schedule = Schedule.from_section(OptimSection(lr=2.0, warmup_steps=0), steps=10)
    assert schedule(0) == 2.0
    assert schedule(1) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 10)))


def test_a_run_shorter_than_its_warmup_never_passes_it() -> None:
    # By epochs, the number of steps is only known when the data is.
    schedule = Schedule.from_section(OptimSection(lr=2.0, warmup_steps=100), steps=50)
    assert schedule(50) == pytest.approx(1.0)
    assert schedule(100) == 2.0


@given(
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.integers(0, 300),
    total=st.integers(1, 1000),
    step=st.integers(1, 1200),
)
@settings(deadline=None)
def test_schedule_rises_then_falls_within_its_bounds(
    peak: float, share: float, warmup: int, total: int, step: int
) -> None:
    assume(warmup < total)
    schedule = Schedule.from_section(
        OptimSection(lr=peak, warmup_steps=warmup, min_lr_share=share), steps=total
    )
    here, there = schedule(step), schedule(step + 1)
    slack = peak * 1e-9
    assert 0 <= here <= peak + slack
    if step < warmup:
        assert there >= here - slack
    else:
        assert here >= there - slack and here >= schedule.floor - slack


def test_scheduler_goes_with_applied_updates_and_restores_the_same_float() -> None:
    schedule = Schedule.from_section(OptimSection(lr=0.7, warmup_steps=3), steps=17)
    scheduler = Scheduler(build_optimizers(model(), SECTION)[0], schedule)
    seen = []
    for _ in range(20):
        rates = {g["lr"] for g in scheduler.optimizers[0].param_groups}
        assert len(rates) == 1
        seen += rates
        scheduler.step()
    assert seen == [schedule(step) for step in range(1, 21)]

    scheduler.load_state_dict({"next_step": 11})
    other = Scheduler(build_optimizers(model(), SECTION)[0], schedule)
    other.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    assert {g["lr"] for g in other.optimizers[0].param_groups} == {schedule(11)}
    assert other.state_dict() == scheduler.state_dict()


def test_the_learning_rate_of_a_step_acts_on_that_step() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizers(layer, OptimSection(weight_decay=0.0))[0]
    scheduler = Scheduler(
        optimizer, Schedule.from_section(OptimSection(lr=0.5, warmup_steps=2), steps=4)
    )
    # Adam moves by lr under a constant gradient: half of the peak, then the peak.
    for expected in (-0.25, -0.75):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        scheduler.step()
        assert layer.weight.item() == pytest.approx(expected, rel=1e-5)


def _sharded_muon(rank: int) -> None:
    """Two steps of Muon, its matrices on shards of unequal height, against torch's own on whole
    ones.
    """
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(8, 6), (5, 7), (3, 16)]
    whole = [
        nn.Parameter(gradient(9, index, torch.Size(shape))) for index, shape in enumerate(shapes)
    ]
    parts = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs, ours = Muon(whole, **options), ShardedMuon(parts, **options)
    for step in range(2):
        for p, q in zip(whole, parts, strict=True):
            p.grad = gradient(step, len(p), p.shape)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        with CommDebugMode() as spoken:
            ours.step()
        assert spoken.get_total_counts() == len(shapes), "one gather a matrix"
        theirs.step()
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]
        buffer = ours.state[q]["momentum_buffer"]
        assert buffer.to_local().shape == q.to_local().shape  # type: ignore[attr-defined]
        torch.testing.assert_close(
            buffer.full_tensor(), theirs.state[p]["momentum_buffer"], rtol=0, atol=0
        )


def test_muon_on_shards_gathers_each_matrix_once(tmp_path: Path) -> None:
    run_ranks(_sharded_muon, 2, folder=tmp_path)
