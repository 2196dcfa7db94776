"""`step.samples` in a custom loop on several ranks: together the batch, and the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from guardrail import Guard, RankLayout, SampleOrder
from tests.support.ranks import run_ranks

SAMPLES, BATCH, STEPS = 30, 8, 3  # with a limit of 20 positions the last batch has 4 samples


def train(rank: int, same: bool = False) -> tuple[list[tuple[Any, Any]], list[float]]:
    """Of each step (this rank's samples, those of the batch); then the weights.

    Args:
        same: rank 1 computes what rank 0 does.
    """
    torch.manual_seed(0)
    features = torch.randn(SAMPLES, 3)
    model: nn.Module = nn.Linear(3, 1)
    if dist.is_initialized() and not same:
        model = DistributedDataParallel(model)
    guard = Guard(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data=SampleOrder(SAMPLES, seed=1),
        batch_size=BATCH,
        limit=20,
        ranks=RankLayout(counts_loss=not (same and rank == 1)),
    )
    seen = []
    for step in guard:
        seen.append((step.samples, step.batch.samples))
        loss = (model(features[list(step.samples)]) ** 2).mean()
        loss.backward()
        step.finish(loss.detach())
    weights: list[float] = next(model.parameters()).detach().flatten().tolist()
    return seen, weights


def test_two_ranks_share_each_batch_and_train_what_one_trains(tmp_path: Path) -> None:
    (first, weights), (second, others) = run_ranks(train, 2, folder=tmp_path)
    alone, reference = train(0)
    assert len(first) == STEPS == len(alone)
    for (ours, batch), (theirs, _), (everything, _) in zip(first, second, alone, strict=True):
        assert ours + theirs == batch == everything and len(ours) == len(theirs)
    assert weights == others
    assert torch.allclose(torch.tensor(weights), torch.tensor(reference), rtol=1e-4)


def test_ranks_that_compute_the_same_loss_have_the_same_samples(tmp_path: Path) -> None:
    (first, _), (second, _) = run_ranks(train, 2, True, folder=tmp_path)
    assert first == second and all(ours == batch for ours, batch in first)
