"""Each staged fault does what its name says, where and as often as it was told, and nothing elsewhere."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.distributed.tensor import DTensor

from guardrail.config import LaunchSection
from tests.ranks import run_ranks, start_ranks, wait_ranks
from trainer.config import Config, FaultSection, ModelSection, TrainSection
from trainer.faults import Faults, StagedFault
from trainer.model import Decoder
from trainer.objectives import IGNORED, loss_sum
from trainer.parallel import accumulating, distribute, make_accelerator, unwrapped

V, T = 17, 6


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fault(kind: Any, **settings: Any) -> FaultSection:
    return FaultSection(**{"kind": kind, "step": 1, **settings})


def decoder() -> Decoder:
    return Decoder(ModelSection(layers=1, width=8, heads=2), vocabulary=V, sequence_length=T, seed=1)


def sample(micro: int = 0) -> Tensor:
    return torch.randint(0, V, (1, T + 1), generator=torch.Generator().manual_seed(micro))


def window(
    faults: Faults, model: torch.nn.Module, *, step: int = 1, positions: tuple[int, ...] = (0, 1), micros: int = 2
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradients of one attempt, with every hook called as the loop calls it."""
    faults.batch(step=step, positions=positions)
    losses = []
    for micro in range(micros):
        ids = sample(micro)
        labels = faults.labels(micro, ids[:, 1:])
        with accumulating(model, last=micro == micros - 1):
            loss, _ = loss_sum(model(ids[:, :-1]), labels)
            loss = faults.loss(micro, model, loss)
            (loss / 10).backward()
        losses.append(loss.item())
    faults.gradients(model)
    gradients = {}
    for name, parameter in unwrapped(model).named_parameters():
        assert parameter.grad is not None
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradients[name] = local.clone()
        parameter.grad = None
    return losses, gradients


def broken(gradients: dict[str, Tensor]) -> dict[str, int]:
    """Entries that are not finite, by parameter."""
    return {name: bad for name, g in gradients.items() if (bad := int((~g.isfinite()).sum()))}


CLEAN_LOSSES, CLEAN = window(Faults([], rank=0), decoder())


def test_no_fault_is_false_and_other_ranks_faults_are_none() -> None:
    assert not Faults([], rank=0)
    assert not Faults([fault("nan_loss", rank=1)], rank=0)
    assert Faults([fault("nan_loss", rank=1)], rank=1)
    assert Faults([fault("nan_loss", rank=-1)], rank=1)


def test_nan_loss_spoils_the_loss_of_its_micro_batch_and_all_gradients() -> None:
    losses, gradients = window(Faults([fault("nan_loss", micro=1)], rank=0), decoder())
    assert losses[0] == CLEAN_LOSSES[0] and math.isnan(losses[1])
    assert broken(gradients).keys() == CLEAN.keys()


def test_spike_loss_multiplies_loss_and_gradients() -> None:
    losses, gradients = window(Faults([fault("spike_loss", value=50.0)], rank=0), decoder())
    assert losses == pytest.approx([50 * loss for loss in CLEAN_LOSSES], rel=1e-6)
    for name, clean in CLEAN.items():
        torch.testing.assert_close(gradients[name], 50 * clean, rtol=1e-4, atol=1e-6)


def test_spike_grad_multiplies_gradients_and_leaves_the_loss() -> None:
    losses, gradients = window(Faults([fault("spike_grad", value=50.0)], rank=0), decoder())
    assert losses == CLEAN_LOSSES
    for name, clean in CLEAN.items():
        torch.testing.assert_close(gradients[name], 50 * clean, rtol=1e-4, atol=1e-6)


def test_spike_grad_of_one_micro_batch() -> None:
    one = window(Faults([], rank=0), decoder(), micros=1)[1]
    _, gradients = window(Faults([fault("spike_grad", value=50.0, micro=0)], rank=0), decoder())
    for name, clean in CLEAN.items():
        torch.testing.assert_close(gradients[name], clean + 49 * one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", [-1, 0, 1])
def test_inf_grad_makes_exactly_one_entry_infinite(micro: int) -> None:
    model = decoder()
    faults = Faults([fault("inf_grad", micro=micro, times=1)], rank=0)
    losses, gradients = window(faults, model)
    assert losses == CLEAN_LOSSES
    assert broken(gradients) == {"norm.weight": 1}
    after = window(faults, model)[1]  # the hook is gone
    assert all(torch.equal(after[name], CLEAN[name]) for name in CLEAN)


def test_inf_grad_reduced_touches_one_entry_and_no_loss() -> None:
    losses, gradients = window(Faults([fault("inf_grad_reduced")], rank=0), decoder())
    assert losses == CLEAN_LOSSES
    assert sum(broken(gradients).values()) == 1


def test_ignore_labels_silences_its_micro_batch_without_touching_the_data() -> None:
    faults = Faults([fault("ignore_labels", micro=0)], rank=0)
    faults.batch(step=1, positions=())
    labels = sample()[:, 1:]
    kept = labels.clone()
    assert (faults.labels(0, labels) == IGNORED).all()
    assert torch.equal(labels, kept)
    assert torch.equal(faults.labels(1, labels), kept)
    assert window(faults, decoder())[0] == [0.0, CLEAN_LOSSES[1]]


def strikes(faults: Faults, step: int, positions: tuple[int, ...]) -> bool:
    faults.batch(step=step, positions=positions)
    return math.isnan(faults.loss(0, decoder(), torch.ones(())).item())


def test_a_fault_by_position_strikes_batches_that_use_one_of_them() -> None:
    faults = Faults([FaultSection(kind="nan_loss", first=10, last=12)], rank=0)
    struck = [strikes(faults, 5, (first, first + 1)) for first in range(6, 16)]
    assert struck == [first in (9, 10, 11) for first in range(6, 16)]
    assert not strikes(faults, 5, (9, 12))  # both samples of the stretch are in quarantine
    assert strikes(faults, 6, (3, 11))  # and at any step


def test_a_fault_by_step_strikes_every_attempt_up_to_times() -> None:
    faults = Faults([fault("nan_loss", step=4, times=2)], rank=0)
    assert [strikes(faults, step, (0,)) for step in (3, 4, 4, 4, 5)] == [False, True, True, False, False]
    assert strikes(Faults([fault("nan_loss", step=4, times=2)], rank=0), 4, (0,))  # a new process counts anew


def test_a_fault_without_step_and_stretch_never_strikes() -> None:
    assert not strikes(Faults([FaultSection(kind="nan_loss")], rank=0), 0, (0,))


def test_two_faults_strike_together() -> None:
    losses, gradients = window(Faults([fault("spike_loss", value=3.0), fault("inf_grad")], rank=0), decoder())
    assert losses == pytest.approx([3 * loss for loss in CLEAN_LOSSES], rel=1e-6)
    assert broken(gradients) == {"norm.weight": 1}


@pytest.mark.parametrize(("micro", "expected"), [(-1, 0), (0, 0), (1, 1)])
def test_raise_strikes_before_its_micro_batch(micro: int, expected: int) -> None:
    faults = Faults([fault("raise", micro=micro)], rank=0)
    faults.batch(step=1, positions=())
    for index in range(expected):
        faults.labels(index, sample())
    with pytest.raises(StagedFault, match="staged on rank 0"):
        faults.labels(expected, sample())


def test_exit_ends_the_process_with_its_status_and_no_clean_up(tmp_path: Path) -> None:
    pids = start_ranks(_exits, 1, folder=tmp_path, init=False)
    assert wait_ranks(pids) == [37]
    assert not (tmp_path / "result-0").exists()


def _exits(rank: int) -> None:
    faults = Faults([fault("exit", value=37.0)], rank=rank)
    faults.batch(step=1, positions=())
    faults.labels(0, sample())


def test_hang_waits_as_long_as_it_was_told_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    faults = Faults([fault("hang", value=7.5)], rank=0)
    faults.batch(step=1, positions=())
    faults.labels(0, sample())
    assert clock == [7.5]
    faults.labels(1, sample())
    assert clock == [7.5]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_the_reduction_one_rank_breaks_all_and_after_it_only_itself(
    strategy: str, precision: str, tmp_path: Path
) -> None:
    config = Config(
        launch=LaunchSection(processes=2, device="cpu", threads=1),
        model=ModelSection(layers=1, width=8, heads=2),
        train=TrainSection(batch_size=4, micro_batch_size=1, strategy=strategy, precision=precision),
    )
    results = run_ranks(_on_rank_one, 2, config, folder=tmp_path)
    before, reduced, clean = zip(*results, strict=True)
    if strategy == "ddp":
        assert before == ({"norm.weight": 1}, {"norm.weight": 1})
    else:  # the first entry of a sharded gradient lies on rank 0, whoever spoiled it
        assert before == ({"norm.weight": 1}, {})
    assert [sum(found.values()) for found in reduced] == [0, 1]
    assert clean == ({}, {})


def _on_rank_one(rank: int, config: Config) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    accelerator = make_accelerator(config)
    model = distribute(Decoder(config.model, vocabulary=V, sequence_length=T, seed=1), config, accelerator)
    before = broken(window(Faults([fault("inf_grad", rank=1)], rank=rank), model)[1])
    reduced = broken(window(Faults([fault("inf_grad_reduced", rank=1)], rank=rank), model)[1])
    clean = broken(window(Faults([], rank=rank), model)[1])
    return before, reduced, clean
