"""The objective, and that a batch cut into micro-batches and ranks in any way gives the same
gradient.
"""

import math

import pytest
import torch
from torch import Tensor

from trainer.config.config import ModelSection
from trainer.model import Decoder
from trainer.objectives.loss import IGNORED, loss_sum, z_penalty

V, T, B = 13, 6, 8


def labels(ignored: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=generator)
    return ids.masked_fill(torch.rand(B, T, generator=generator) < ignored, IGNORED)


@pytest.mark.fault("A7")
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("what", ["loss", "z-loss"])
def test_an_ignored_position_with_a_logit_that_is_not_finite_counts_for_nothing(
    what: str, value: float
) -> None:
    clean = torch.randn(1, 3, V, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, IGNORED, 3]])
    spoiled = clean.clone()
    spoiled[0, 1, 2] = value
    results = []
    for logits in (clean, spoiled):
        logits.requires_grad_()
        total = loss_sum(logits, targets)[0] if what == "loss" else z_penalty(logits, targets, 0.1)
        (gradient,) = torch.autograd.grad(total, logits)
        results.append((total.item(), gradient))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_loss_sum_is_the_sum_over_counted_tokens() -> None:
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))
    targets = labels(0.4)
    total, count = loss_sum(logits, targets)
    expected, tokens = 0.0, 0
    for row, target in zip(logits.flatten(0, 1).double(), targets.flatten().tolist(), strict=True):
        if target != IGNORED:
            expected -= row.log_softmax(-1)[target].item()
            tokens += 1
    assert total.dtype == torch.float32 and total.shape == ()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert count.item() == tokens < B * T


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    total, _ = loss_sum(logits, labels(0.0))
    assert total.dtype == torch.float32
    assert torch.equal(total, loss_sum(logits.float(), labels(0.0))[0])


def test_fp32_logits_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(B, T, V)
    seen = []
    original = torch.nn.functional.cross_entropy

    def spy(rows: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(rows.data_ptr())
        return original(rows, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    loss_sum(logits, labels(0.0))
    assert seen == [logits.data_ptr()]


def test_a_micro_batch_without_labels_weighs_nothing() -> None:
    logits = torch.randn(2, T, V, requires_grad=True)
    total, count = loss_sum(logits, torch.full((2, T), IGNORED))
    total.backward()
    assert total.item() == 0.0 and count.item() == 0
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


def gradients(
    targets: Tensor, *, micro_batch: int, world: int = 1
) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of one batch in float64, as loop and guard form them: ranks average, then
    one factor.
    """
    model = Decoder(
        ModelSection(layers=1, width=8, heads=2), vocabulary=V, sequence_length=T, seed=1
    ).double()
    ids = torch.randint(0, V, (len(targets), T), generator=torch.Generator().manual_seed(2))
    nominal = B * T
    reduced = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    loss, tokens = 0.0, 0
    for rank in range(world):
        model.zero_grad()
        share_ids, share_targets = ids[rank::world], targets[rank::world]
        for at in range(0, len(share_ids), micro_batch):
            total, count = loss_sum(
                model(share_ids[at : at + micro_batch]), share_targets[at : at + micro_batch]
            )
            (total * (world / nominal)).backward()
            loss += total.item()
            tokens += int(count)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                reduced[name] += parameter.grad / world
    return {name: g * (nominal / tokens) for name, g in reduced.items()}, loss / tokens


def mean_gradients(targets: Tensor) -> tuple[dict[str, Tensor], float]:
    """The definition: mean cross-entropy over all label tokens of the whole batch."""
    model = Decoder(
        ModelSection(layers=1, width=8, heads=2), vocabulary=V, sequence_length=T, seed=1
    ).double()
    ids = torch.randint(0, V, (len(targets), T), generator=torch.Generator().manual_seed(2))
    loss = torch.nn.functional.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss.item()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("case", ["full", "uneven", "one half silent", "short window"])
def test_gradients_do_not_depend_on_the_cut(world: int, accumulation: int, case: str) -> None:
    targets = labels(0.0 if case == "full" else 0.5)
    if case == "one half silent":
        targets[: B // 2] = IGNORED
    if case == "short window":  # the end of the data: fewer samples than a batch
        targets = targets[: B - 3]
    expected, expected_loss = mean_gradients(targets)
    found, loss = gradients(targets, micro_batch=B // accumulation // world, world=world)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-12, msg=name)
