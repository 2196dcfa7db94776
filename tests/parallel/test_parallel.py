"""One rank, two ranks, ddp or fsdp: the same step. Dice by position, settled buckets, a world that
is checked.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from guardrail.core.errors import WorkersFailed
from guardrail.core.sections import LaunchSection
from tests.support.ranks import run_ranks
from tests.support.running import assert_same, tiny, trained
from trainer.config.config import Config, ModelSection
from trainer.config.sections import TrainSection
from trainer.model import Decoder
from trainer.objectives.loss import IGNORED, loss_sum
from trainer.optim.registry import build_optimizers
from trainer.parallel.data_parallel import (
    accumulate_gradients,
    cpu_threads,
    distribute_model,
    is_sharded,
    make_accelerator,
    seed_micro_batch,
    unwrap_model,
)

V, T, B = 29, 8, 4


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its state in class attributes; one test's precision would be the next
    one's.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def settings(world: int = 1, *, model: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config(
        launch=LaunchSection(processes=world, device="cpu", threads=1, collective_timeout=60),
        model=ModelSection(**{"layers": 2, "width": 16, "heads": 2, **(model or {})}),
        train=TrainSection(batch_size=B, **train),
    )


def build(config: Config) -> tuple[torch.nn.Module, Decoder]:
    accelerator = make_accelerator(config)
    decoder = Decoder(config.model, vocabulary=V, sequence_length=T, seed=1)
    model = distribute_model(decoder, config, accelerator)
    return model, unwrap_model(model)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, 2:] = IGNORED  # uneven: the first sample teaches two tokens
    return ids[:, :-1], targets


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(
    model: torch.nn.Module, config: Config, rank: int, *, seeds: bool = False
) -> dict[str, Tensor]:
    """Corrected gradients of one batch, as the loop forms them."""
    tokens, targets = batch()
    share = B // config.world
    mine = slice(rank * share, (rank + 1) * share)
    nominal = B * T
    counted = torch.zeros((), dtype=torch.int64)
    size = config.micro_batch_size
    for micro in range(config.micro_batches):
        rows = slice(mine.start + micro * size, mine.start + (micro + 1) * size)
        if seeds:
            seed_micro_batch(5, rows.start, rank)
        with accumulate_gradients(model, last=micro == config.micro_batches - 1):
            total, count = loss_sum(model(tokens[rows]), targets[rows])
            (total * (config.world / nominal)).backward()
        counted += count
    if dist.is_initialized():
        dist.all_reduce(counted)
    factor = nominal / int(counted)
    return {
        name: whole(p.grad) * factor
        for name, p in unwrap_model(model).named_parameters()
        if p.grad is not None
    }


def train(rank: int, config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the first step and the weights after three, whole and in fp32."""
    model, decoder = build(config)
    optimizer = build_optimizers(decoder, config.optim)[0]
    first: dict[str, Tensor] = {}
    for _ in range(3):
        gradients = step(model, config, rank)
        first = first or gradients
        for p in decoder.parameters():
            assert p.grad is not None and p.grad.dtype == p.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    return first, {name: whole(p) for name, p in decoder.named_parameters()}


def reference(tied: bool) -> dict[str, Tensor]:
    """Gradients of the mean over the batch's label tokens by plain torch, in float64."""
    decoder = Decoder(
        settings(model={"tied": tied}).model, vocabulary=V, sequence_length=T, seed=1
    ).double()
    tokens, targets = batch()
    torch.nn.functional.cross_entropy(decoder(tokens).flatten(0, 1), targets.flatten()).backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


CUTS = [(1, "ddp"), (1, "fsdp"), (2, "ddp"), (2, "fsdp")]


@pytest.mark.parametrize("tied", [True, False])
def test_every_way_of_spreading_gives_the_same_step(tied: bool, tmp_path: Path) -> None:
    expected = reference(tied)
    weights: list[dict[str, Tensor]] = []
    for world, strategy in CUTS:
        for recompute, micro in ((False, 0), (True, 1)):
            config = settings(
                world,
                model={"tied": tied},
                strategy=strategy,
                micro_batch_size=micro,
                activation_checkpointing=recompute,
            )
            results = run_ranks(train, world, config, folder=tmp_path)
            label = f"{world} {strategy} recompute={recompute}"
            for gradients, after in results:
                assert gradients.keys() == after.keys() == expected.keys(), label
                assert ("head.weight" in after) is not tied, label
                for name in expected:
                    torch.testing.assert_close(
                        gradients[name].double(),
                        expected[name],
                        rtol=1e-5,
                        atol=1e-7,
                        msg=f"{label}: {name}",
                    )
                    assert torch.equal(after[name], results[0][1][name]), (
                        f"{label}: ranks differ in {name}"
                    )
            weights.append(results[0][1])
    for after in weights[1:]:
        for name in expected:
            torch.testing.assert_close(
                after[name], weights[0][name], rtol=1e-5, atol=1e-5, msg=name
            )


@pytest.mark.parametrize(("world", "strategy"), CUTS)
def test_bf16_computes_in_bf16_and_keeps_fp32_weights(
    world: int, strategy: str, tmp_path: Path
) -> None:
    expected = reference(True)
    results = run_ranks(
        _bf16, world, settings(world, strategy=strategy, precision="bf16"), folder=tmp_path
    )
    for logits, products, gradients in results:
        assert logits == torch.float32
        assert products == {torch.bfloat16}
        for name in expected:
            error = (gradients[name].double() - expected[name]).norm() / expected[name].norm()
            assert 1e-6 < error < 0.05, f"{name}: {error}"


def _bf16(rank: int, config: Config) -> tuple[torch.dtype, set[torch.dtype], dict[str, Tensor]]:
    model, decoder = build(config)
    products: set[torch.dtype] = set()
    for block in decoder.blocks:
        block.feed_forward.down.register_forward_hook(
            lambda _m, _i, output: products.add(output.dtype)
        )
    logits = model(batch()[0])
    gradients = step(model, config, rank)
    return logits.dtype, products, gradients


@pytest.mark.parametrize(("world", "strategy"), CUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_changes_no_bit(
    world: int, strategy: str, precision: str, tmp_path: Path
) -> None:
    results = [
        run_ranks(
            _with_dropout,
            world,
            settings(
                world,
                model={"dropout": 0.2},
                strategy=strategy,
                precision=precision,
                micro_batch_size=1,
                activation_checkpointing=recompute,
            ),
            folder=tmp_path,
        )
        for recompute in (False, True)
    ]
    for without, with_ in zip(*results, strict=True):
        for name in without:
            assert torch.equal(without[name], with_[name]), name


def _with_dropout(rank: int, config: Config) -> dict[str, Tensor]:
    model, _ = build(config)
    return step(model, config, rank, seeds=True)


def test_dropout_follows_position_and_rank_and_nothing_else(tmp_path: Path) -> None:
    config = settings(2, model={"dropout": 0.3}, micro_batch_size=1)
    (a, b), (c, d) = run_ranks(_dice, 2, config, folder=tmp_path)
    assert torch.equal(a[0], b[0])  # the dice between were thrown differently
    assert torch.equal(c[0], d[0])
    assert not torch.equal(a[0], a[1])  # other positions
    assert not torch.equal(a[0], c[0])  # another rank


def _dice(rank: int, config: Config) -> list[list[Tensor]]:
    model, _ = build(config)
    tokens, _ = batch()
    runs = []
    for before in (0, 1):
        torch.manual_seed(before)
        torch.rand(1 + before)
        outputs = []
        for position in (10, 11):
            seed_micro_batch(3, position, rank)
            outputs.append(model(tokens[:1]).detach())
        runs.append(outputs)
    return runs


def test_seeding_covers_all_64_bits() -> None:
    drawn = set()
    for position in range(50):
        seed_micro_batch(0, position, 0)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 50
    seed_micro_batch(2**64 - 1, 2**62, 10**6)


# About 2 MB of gradients, so that DDP has more than one bucket, and three ranks, so that the order
# of addition counts.
WIDE = {"layers": 2, "width": 128, "heads": 2}


def test_the_first_backward_adds_in_the_order_of_all_others(tmp_path: Path) -> None:
    config = settings(3, model=WIDE)
    for first, second, layouts in run_ranks(_first_and_second, 3, config, folder=tmp_path):
        assert layouts > 1, "one bucket proves nothing"
        for name in first:
            assert torch.equal(first[name], second[name]), name


def _first_and_second(
    rank: int, config: Config
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    accelerator = make_accelerator(config)
    model = distribute_model(
        Decoder(config.model, vocabulary=V, sequence_length=T, seed=1), config, accelerator
    )
    assert isinstance(model, DistributedDataParallel)
    tokens = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(rank))
    runs = []
    for _ in range(2):
        loss_sum(model(tokens[:, :-1]), tokens[:, 1:])[0].backward()
        runs.append(
            {
                name: whole(p.grad)
                for name, p in model.module.named_parameters()
                if p.grad is not None
            }
        )
        model.zero_grad()
    sizes = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return runs[0], runs[1], len(str(sizes).split(","))


def test_distribute_leaves_weights_gradients_and_dice_alone(tmp_path: Path) -> None:
    assert all(run_ranks(_untouched, 2, settings(2, model={"dropout": 0.5}), folder=tmp_path))


def _untouched(rank: int, config: Config) -> bool:
    accelerator = make_accelerator(config)
    decoder = Decoder(config.model, vocabulary=V, sequence_length=T, seed=1)
    before = [p.detach().clone() for p in decoder.parameters()]
    dice = torch.get_rng_state()
    distribute_model(decoder, config, accelerator)
    same = all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))
    return (
        same
        and torch.equal(dice, torch.get_rng_state())
        and all(p.grad is None for p in decoder.parameters())
    )


def test_fsdp_shards_every_parameter_and_its_moments(tmp_path: Path) -> None:
    held = run_ranks(_held, 2, settings(2, strategy="fsdp", model={"tied": False}), folder=tmp_path)
    total = sum(
        p.numel()
        for p in Decoder(
            settings(model={"tied": False}).model, vocabulary=V, sequence_length=T
        ).parameters()
    )
    assert sum(parameters for parameters, _ in held) == total
    assert all(moments == 2 * parameters for parameters, moments in held)
    assert all(parameters < 0.6 * total for parameters, _ in held)


def _held(rank: int, config: Config) -> tuple[int, int]:
    model, decoder = build(config)
    assert is_sharded(model)
    optimizer = build_optimizers(decoder, config.optim)[0]
    step(model, config, rank)
    optimizer.step()
    parameters = sum(p.to_local().numel() for p in decoder.parameters() if isinstance(p, DTensor))
    moments = sum(
        s[key].to_local().numel()
        for s in optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    )
    return parameters, moments


def test_only_the_last_micro_batch_talks_to_the_other_ranks(tmp_path: Path) -> None:
    assert run_ranks(
        _differs_before_the_last, 2, settings(2, micro_batch_size=1), folder=tmp_path
    ) == [True, True]


def _differs_before_the_last(rank: int, config: Config) -> bool:
    model, decoder = build(config)
    tokens, targets = batch()
    agreements = []
    for micro, last in enumerate((False, True)):
        with accumulate_gradients(model, last=last):
            loss_sum(model(tokens[[2 * rank + micro]]), targets[[2 * rank + micro]])[0].backward()
        gradient = whole(decoder.norm.weight.grad)  # type: ignore[arg-type]
        theirs = gradient.clone()
        dist.broadcast(theirs, 0)
        same = torch.tensor(float(torch.equal(gradient, theirs)))
        dist.all_reduce(same, dist.ReduceOp.MIN)
        agreements.append(bool(same))
    return agreements == [False, True]


def test_a_single_ddp_process_is_the_plain_model(tmp_path: Path) -> None:
    model, decoder = build(settings())
    assert model is decoder and not is_sharded(model)
    assert not dist.is_initialized()
    # as torchrun starts it
    assert run_ranks(_is_plain, 1, settings(), folder=tmp_path, init=False) == [True]


def _is_plain(rank: int, config: Config) -> bool:
    model, decoder = build(config)
    return model is decoder


def test_evaluation_runs_without_gradients(tmp_path: Path) -> None:
    for strategy in ("ddp", "fsdp"):
        losses = run_ranks(
            _evaluate, 2, settings(2, strategy=strategy, model={"dropout": 0.5}), folder=tmp_path
        )
        assert losses[0] == losses[1] and losses[0][0] == losses[0][1]


def _evaluate(rank: int, config: Config) -> list[float]:
    model, _ = build(config)
    tokens, targets = batch()
    losses = []
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            losses.append(loss_sum(model(tokens), targets)[0].item())
        model.train()
        step(model, config, rank)
        model.zero_grad()
    return losses


def test_backward_by_accelerate_scales_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(settings(micro_batch_size=1))
    x = torch.ones((), requires_grad=True)
    accelerator.backward(3 * x)
    assert x.grad is not None and x.grad.item() == 3.0


def test_one_process_where_two_are_configured_is_refused() -> None:
    with pytest.raises(WorkersFailed, match=r"1 process\(es\) take part.* = 2"):
        make_accelerator(settings(2))


def test_two_processes_where_one_is_configured_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(_refused, 2, settings(1), folder=tmp_path):
        assert message.startswith("2 process(es) take part")


def _refused(rank: int, config: Config) -> str:
    with pytest.raises(WorkersFailed) as error:
        make_accelerator(config)
    return str(error.value)


def test_settings_from_the_environment_are_refused(tmp_path: Path) -> None:
    # `accelerate config` and `accelerate launch` write such variables, and some win over arguments.
    environment = {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_TORCH_DEVICE": "meta"}
    (message,) = run_ranks(
        _with_environment, 1, settings(), environment, folder=tmp_path, init=False
    )
    assert message.startswith("Accelerate chose device 'meta'")
    assert "ACCELERATE_TORCH_DEVICE" in message


def _with_environment(rank: int, config: Config, environment: dict[str, str]) -> str:
    os.environ.update(environment)
    with pytest.raises(WorkersFailed) as error:
        make_accelerator(config)
    return str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_where_there_is_none_is_refused() -> None:
    config = Config(launch=LaunchSection(device="cuda"))
    with pytest.raises(WorkersFailed, match="no CUDA device"):
        make_accelerator(config)


@pytest.mark.fault("R13")
def test_threads_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user sets wins: launch.threads, then OMP_NUM_THREADS, which may have a number for
    each level.
    """
    for given, expected in (("2", 2), ("5,1", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert cpu_threads(Config(launch=LaunchSection(processes=1))) == expected
        assert cpu_threads(Config(launch=LaunchSection(threads=3))) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("trainer.parallel.data_parallel.cores", lambda: 4)
    assert cpu_threads(Config(launch=LaunchSection(processes=1))) == 4
    assert cpu_threads(Config(launch=LaunchSection(threads=3))) == 3
    assert cpu_threads(Config(launch=LaunchSection(processes=1000))) == 1


def test_a_lost_rank_ends_the_others_after_the_configured_time(tmp_path: Path) -> None:
    config = Config(
        launch=LaunchSection(processes=2, device="cpu", threads=1, collective_timeout=1.0)
    )
    waited = run_ranks(_waits_for_nobody, 2, config, folder=tmp_path, init=False)
    assert waited[1] > 0.5


def _waits_for_nobody(rank: int, config: Config) -> float:
    make_accelerator(config)
    start = time.monotonic()
    if rank == 0:
        time.sleep(3.0)  # in place of a hang: never takes part
        return 0.0
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        dist.all_reduce(torch.zeros(1))
    return time.monotonic() - start


def test_deterministic_algorithms_are_asked_for_and_change_no_bit_on_a_cpu(tmp_path: Path) -> None:
    config = tiny(tmp_path, train={"steps": 8, "deterministic": True})
    assert run_ranks(_deterministic, 1, config, folder=tmp_path / "asked", init=False) == [
        (True, ":4096:8")
    ]
    assert_same(trained(config), trained(tiny(tmp_path, train={"steps": 8})))


def _deterministic(rank: int, config: Config) -> tuple[bool, str]:
    make_accelerator(config)
    return torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
