"""Each staged fault does what its name says, where and as often as it was told, and nothing
elsewhere.
"""

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

from guardrail.core.sections import LaunchSection
from tests.support.ranks import run_ranks, start_ranks, wait_ranks
from trainer.config.config import Config, ModelSection
from trainer.config.sections import FaultSection, TrainSection
from trainer.data.loader import MicroBatch
from trainer.faults.damage import flip_bit
from trainer.faults.fault_injection import Faults, StagedFault
from trainer.model import Decoder
from trainer.objectives.loss import IGNORED, loss_sum
from trainer.parallel.data_parallel import (
    accumulate_gradients,
    distribute_model,
    make_accelerator,
    unwrap_model,
)

V, T = 17, 6


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fault(kind: Any, **settings: Any) -> FaultSection:
    return FaultSection(**{"kind": kind, "step": 1, **settings})


def decoder() -> Decoder:
    return Decoder(
        ModelSection(layers=1, width=8, heads=2), vocabulary=V, sequence_length=T, seed=1
    )


def sample(micro: int = 0) -> Tensor:
    return torch.randint(0, V, (1, T + 1), generator=torch.Generator().manual_seed(micro))


def window(
    faults: Faults,
    model: torch.nn.Module,
    *,
    step: int = 1,
    positions: tuple[int, ...] = (0, 1),
    micros: int = 2,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradients of one attempt, with every hook called as the loop calls it."""
    faults.choose_for_step(step=step, positions=positions)
    losses = []
    for micro in range(micros):
        ids = sample(micro)
        labels = faults.damage_labels(micro, ids[:, 1:])
        with accumulate_gradients(model, last=micro == micros - 1):
            loss, _ = loss_sum(model(ids[:, :-1]), labels)
            loss = faults.damage_loss(micro, model, loss)
            (loss / 10).backward()
        losses.append(loss.item())
    faults.damage_gradients(model)
    gradients = {}
    for name, parameter in unwrap_model(model).named_parameters():
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
    faults.choose_for_step(step=1, positions=())
    labels = sample()[:, 1:]
    kept = labels.clone()
    assert (faults.damage_labels(0, labels) == IGNORED).all()
    assert torch.equal(labels, kept)
    assert torch.equal(faults.damage_labels(1, labels), kept)
    assert window(faults, decoder())[0] == [0.0, CLEAN_LOSSES[1]]


def strikes(faults: Faults, step: int, positions: tuple[int, ...]) -> bool:
    faults.choose_for_step(step=step, positions=positions)
    return math.isnan(faults.damage_loss(0, decoder(), torch.ones(())).item())


def test_a_fault_by_position_strikes_batches_that_use_one_of_them() -> None:
    faults = Faults([FaultSection(kind="nan_loss", first=10, last=12)], rank=0)
    struck = [strikes(faults, 5, (first, first + 1)) for first in range(6, 16)]
    assert struck == [first in (9, 10, 11) for first in range(6, 16)]
    assert not strikes(faults, 5, (9, 12))  # both samples of the stretch are in quarantine
    assert strikes(faults, 6, (3, 11))  # and at any step


def test_a_fault_by_step_strikes_every_attempt_up_to_times() -> None:
    faults = Faults([fault("nan_loss", step=4, times=2)], rank=0)
    assert [strikes(faults, step, (0,)) for step in (3, 4, 4, 4, 5)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    # a new process counts anew
    assert strikes(Faults([fault("nan_loss", step=4, times=2)], rank=0), 4, (0,))


def test_a_fault_without_step_and_stretch_never_strikes() -> None:
    assert not strikes(Faults([FaultSection(kind="nan_loss")], rank=0), 0, (0,))


def test_two_faults_strike_together() -> None:
    losses, gradients = window(
        Faults([fault("spike_loss", value=3.0), fault("inf_grad")], rank=0), decoder()
    )
    assert losses == pytest.approx([3 * loss for loss in CLEAN_LOSSES], rel=1e-6)
    assert broken(gradients) == {"norm.weight": 1}


@pytest.mark.parametrize(("micro", "expected"), [(-1, 0), (0, 0), (1, 1)])
def test_raise_strikes_before_its_micro_batch(micro: int, expected: int) -> None:
    faults = Faults([fault("raise", micro=micro)], rank=0)
    faults.choose_for_step(step=1, positions=())
    for index in range(expected):
        faults.damage_labels(index, sample())
    with pytest.raises(StagedFault, match=r"rank 0 .*\[\[faults\]\]"):
        faults.damage_labels(expected, sample())


def test_exit_ends_the_process_with_its_status_and_no_clean_up(tmp_path: Path) -> None:
    pids = start_ranks(_exits, 1, folder=tmp_path, init=False)
    assert wait_ranks(pids) == [37]
    assert not (tmp_path / "result-0").exists()


def _exits(rank: int) -> None:
    faults = Faults([fault("exit", value=37.0)], rank=rank)
    faults.choose_for_step(step=1, positions=())
    faults.damage_labels(0, sample())


def test_hang_waits_as_long_as_it_was_told_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    faults = Faults([fault("hang", value=7.5)], rank=0)
    faults.choose_for_step(step=1, positions=())
    faults.damage_labels(0, sample())
    assert clock == [7.5]
    faults.damage_labels(1, sample())
    assert clock == [7.5]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_the_reduction_one_rank_breaks_all_and_after_it_only_itself(
    strategy: str, precision: str, tmp_path: Path
) -> None:
    config = Config(
        launch=LaunchSection(processes=2, device="cpu", threads=1),
        model=ModelSection(layers=1, width=8, heads=2),
        train=TrainSection(
            batch_size=4, micro_batch_size=1, strategy=strategy, precision=precision
        ),
    )
    results = run_ranks(_on_rank_one, 2, config, folder=tmp_path)
    before, reduced, clean = zip(*results, strict=True)
    if strategy == "ddp":
        assert before == ({"norm.weight": 1}, {"norm.weight": 1})
    else:  # the first entry of a sharded gradient lies on rank 0, whoever spoiled it
        assert before == ({"norm.weight": 1}, {})
    assert [sum(found.values()) for found in reduced] == [0, 1]
    assert clean == ({}, {})


def _on_rank_one(
    rank: int, config: Config
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    accelerator = make_accelerator(config)
    model = distribute_model(
        Decoder(config.model, vocabulary=V, sequence_length=T, seed=1), config, accelerator
    )
    before = broken(window(Faults([fault("inf_grad", rank=1)], rank=rank), model)[1])
    reduced = broken(window(Faults([fault("inf_grad_reduced", rank=1)], rank=rank), model)[1])
    clean = broken(window(Faults([], rank=rank), model)[1])
    return before, reduced, clean


# -- data ------------------------------------------------------------------------------------------


def rows(
    kind: Any, *, now: int = 1, again: bool = False, **settings: Any
) -> tuple[MicroBatch, MicroBatch]:
    """(a micro-batch of four samples at positions 8 to 11, what a fault makes of it)."""
    ids = torch.randint(0, V // 2, (4, T + 1), generator=torch.Generator().manual_seed(3)).numpy()
    labels = ids[:, 1:].copy()
    labels[1, 2] = IGNORED
    clean = MicroBatch(
        tokens=ids[:, :-1].copy(), labels=labels, position=8, sample_ids=(0, 1, 2, 3)
    )
    faults = Faults([FaultSection(kind=kind, **settings)], rank=0)
    (faults.choose_for_replay if again else faults.choose_for_step)(
        step=now, positions=(8, 9, 10, 11)
    )
    kept = clean.tokens.copy(), clean.labels.copy()
    (spoiled,) = faults.damage_data([clean], [(8, 9, 10, 11)], vocabulary=V)
    assert (clean.tokens == kept[0]).all() and (clean.labels == kept[1]).all()
    return clean, spoiled


@pytest.mark.parametrize("kind", ["noise_tokens", "repeat_tokens", "shuffle_labels"])
def test_text_is_spoiled_in_the_samples_of_the_stretch_and_alike_each_time(kind: str) -> None:
    clean, spoiled = rows(kind, first=9, last=11)
    same = [bool((clean.labels[row] == spoiled.labels[row]).all()) for row in range(4)]
    assert same == [True, False, False, True]
    assert (spoiled.labels == IGNORED).sum() == 1 and spoiled.labels[1, 2] == IGNORED
    _, again = rows(kind, first=9, last=11, now=7, again=True)
    assert (again.tokens == spoiled.tokens).all() and (again.labels == spoiled.labels).all()


def test_what_each_kind_of_spoiled_text_is() -> None:
    clean, noise = rows("noise_tokens", first=8, last=9)
    assert (noise.tokens[0] >= V // 2).all() and (noise.labels[0, :-1] == noise.tokens[0, 1:]).all()
    _, ngram = rows("repeat_tokens", first=8, last=9)
    assert (ngram.tokens[0, :-3] == ngram.tokens[0, 3:]).all() and (
        ngram.labels[0, :-1] == ngram.tokens[0, 1:]
    ).all()
    _, wrong = rows("shuffle_labels", first=8, last=9)
    assert (wrong.tokens == clean.tokens).all()
    assert sorted(wrong.labels[0]) == sorted(clean.labels[0])


@pytest.mark.parametrize(("step", "hit"), [(4, False), (5, True), (6, True), (7, False)])
def test_text_by_step_is_spoiled_in_all_samples(step: int, hit: bool) -> None:
    _, spoiled = rows("noise_tokens", now=step, step=5, steps=2)
    assert (spoiled.tokens >= V // 2).all() == hit


# -- state -----------------------------------------------------------------------------------------


def trained() -> tuple[Decoder, torch.optim.AdamW]:
    """A model whose optimizer has moments."""
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_sum(model(sample()[:, :-1]), sample()[:, 1:])[0].backward()
    optimizer.step()
    return model, optimizer


def struck(kind: Any, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments before and after a fault of the state that strikes once."""
    model, optimizer = trained()
    before = everything(model, optimizer)
    faults = Faults([fault(kind, times=1, **settings)], rank=0)
    faults.choose_for_replay(step=1, positions=())
    faults.damage_state(model, [optimizer])
    assert all(
        torch.equal(now, before[name]) for name, now in everything(model, optimizer).items()
    ), "in a replay"
    faults.choose_for_step(step=1, positions=())
    faults.damage_state(model, [optimizer])
    after = everything(model, optimizer)
    faults.choose_for_step(step=1, positions=())
    faults.damage_state(model, [optimizer])
    assert all(
        torch.equal(now, after[name]) for name, now in everything(model, optimizer).items()
    ), "a second time"
    return before, after


def everything(model: Decoder, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"{key} {name}"] = value.clone()
    return tensors


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    return {name: n for name in before if (n := int((before[name] != after[name]).sum()))}


def test_all_weights_are_scaled() -> None:
    before, after = struck("scale_weights", value=1000.0)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight if " " in name else 1000 * weight)


def test_one_row_of_the_embedding_is_scaled() -> None:
    before, after = struck("scale_row", value=50.0, entry=V + 3)
    assert changed(before, after) == {"embedding.weight": 8}
    torch.testing.assert_close(after["embedding.weight"][3], 50 * before["embedding.weight"][3])


@pytest.mark.parametrize(
    ("kind", "prefix"), [("flip_weight", "blocks.0."), ("flip_moment", "exp_avg blocks.0.")]
)
def test_one_bit_is_flipped(kind: str, prefix: str) -> None:
    before, after = struck(kind, value=30.0, entry=5)
    ((name, entries),) = changed(before, after).items()
    assert name.startswith(prefix) and entries == 1
    old, new = before[name].view(-1)[5], after[name].view(-1)[5]
    assert old.view(torch.int32) ^ new.view(torch.int32) == 1 << 30
    assert abs(new) > 1e30


def test_the_sign_bit_can_be_flipped_too() -> None:
    tensor = torch.tensor([1.5, -2.0])
    flip_bit(tensor, entry=1, bit=31)
    assert tensor.tolist() == [1.5, 2.0]
    half = torch.tensor([1.5], dtype=torch.bfloat16)
    flip_bit(half, entry=0, bit=15)
    assert half.item() == -1.5


def test_moments_are_zeroed_and_their_count_of_steps_is_kept() -> None:
    before, after = struck("zero_moments")
    assert changed(before, after).keys() <= {name for name in before if name.startswith("exp_avg")}
    assert all(not tensor.any() for name, tensor in after.items() if name.startswith("exp_avg"))


# -- the rest --------------------------------------------------------------------------------------


def test_the_rate_is_raised_within_the_step_alone() -> None:
    model, optimizer = trained()
    faults = Faults([fault("scale_lr", step=2, steps=2, value=30.0)], rank=0)
    faults.attach(model, [optimizer])
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda hooked, *_: seen.append(hooked.param_groups[0]["lr"]))
    for step in range(1, 5):
        faults.choose_for_step(step=step, positions=())
        faults.choose_for_replay(step=2, positions=())  # a replay of another step changes nothing
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert seen == pytest.approx([1e-3, 3e-2, 3e-2, 1e-3])


def test_a_nan_gradient_is_one_entry() -> None:
    losses, gradients = window(Faults([fault("nan_grad", micro=0)], rank=0), decoder())
    assert losses == CLEAN_LOSSES
    assert broken(gradients) == {"norm.weight": 1}
    assert gradients["norm.weight"].isnan().any()


def test_only_what_comes_back_to_the_embedding_is_raised() -> None:
    """Of tied weights that is the part of the input; nothing else of the model sees it, nor the
    other micro-batch.
    """
    both, second = (
        Faults([fault("spike_embedding", value=1000.0, micro=micro)], rank=0) for micro in (-1, 1)
    )
    models = [decoder(), decoder()]
    for faults, model in zip((both, second), models, strict=True):
        faults.attach(model, [])
    (losses, gradients), (_, half) = window(both, models[0]), window(second, models[1])
    assert losses == CLEAN_LOSSES
    weight = "embedding.weight"
    assert all(torch.equal(gradients[name], CLEAN[name]) for name in CLEAN if name != weight)
    assert gradients[weight].norm() > 100 * CLEAN[weight].norm() > 0
    assert CLEAN[weight].norm() < half[weight].norm() < gradients[weight].norm()
    assert torch.equal(window(both, models[0], step=2)[1][weight], CLEAN[weight])


def test_garbage_has_the_size_it_was_told_and_is_another_each_time() -> None:
    faults = Faults([fault("garbage_grad", value=100.0, times=2)], rank=0)
    found = []
    for _ in range(3):
        faults.choose_for_step(step=1, positions=())
        logits = torch.ones(2, 3, requires_grad=True)
        (faults.damage_logits(0, logits * 1.0) * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
        assert logits.grad is not None
        found.append(logits.grad)
    clean = math.sqrt(2 * 25)
    assert [float(g.norm()) for g in found] == pytest.approx([100 * clean, 100 * clean, clean])
    assert not torch.equal(found[0], found[1])
