"""A custom loop on two ranks: one run directory for both, and gradients that nothing averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from guardrail.core.errors import UsageError
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.guard import Guard
from guardrail.torch.guard.hooks import RankLayout
from guardrail.torch.state.rank_agreement import require_same_run
from tests.support.ranks import run_ranks


def train(model: nn.Module, run: RunDirectory | None, **arguments: Any) -> Guard:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(
        model,
        optimizer,
        config={"snapshots": {"keep": 0}},
        data=SampleOrder(8),
        batch_size=4,
        total_steps=2,
        run=run,
        **arguments,
    )
    for step in guard:
        loss = model(torch.ones(2, 2)).square().mean()
        loss.backward()
        step.finish(loss)
    return guard


def share_run(folder: Path) -> RunDirectory:
    """Create a run on rank 0 and open it on the others, as docs/integrations.md does."""
    paths = [""]
    if dist.get_rank() == 0:
        paths = [str(RunDirectory.create(folder, "own").path)]
    dist.broadcast_object_list(paths)
    return RunDirectory.open(paths[0])


def _train_in_own_runs(rank: int, folder: Path, with_run: tuple[int, ...]) -> tuple[str, str, str]:
    run = None
    path = "None"
    if rank in with_run:
        run = RunDirectory.create(folder, "own")
        path = str(run.path)
    with pytest.raises(UsageError) as caught:
        train(DistributedDataParallel(nn.Linear(2, 1)), run)
    return path, caught.value.kind, str(caught.value)


@pytest.mark.parametrize("with_run", [(0, 1), (0,), (1,)])
def test_ranks_with_different_run_directories_are_refused_on_every_rank(
    tmp_path: Path, with_run: tuple[int, ...]
) -> None:
    found = run_ranks(
        _train_in_own_runs, 2, tmp_path / "runs", with_run, folder=tmp_path / "results", seconds=60
    )
    (first, kind, message), (second, other_kind, other_message) = found
    assert kind == other_kind == "different_runs"
    assert message == other_message and first in message and second in message


def test_one_folder_by_two_paths_is_the_same_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "own")
    link = tmp_path / "link"
    link.symlink_to(run.path)

    def gather(value: Any) -> list[Any]:
        other = ("other-host", "/mnt/elsewhere/own", 7, value[3])
        return [value, other]

    require_same_run(link, gather)
    with pytest.raises(UsageError) as caught:
        require_same_run(link, lambda value: [value, ("other-host", "/mnt/elsewhere/own", 7, None)])
    assert caught.value.kind == "different_runs"
    assert str(run.path) in str(caught.value) and "/mnt/elsewhere/own" in str(caught.value)
    # Two file systems of one host give the same numbers to different folders.
    with pytest.raises(UsageError) as caught:
        require_same_run(
            link, lambda value: [value, (value[0], "/tmp/own", value[2] + 1, value[3])]
        )
    assert caught.value.kind == "different_runs"


def _notes(rank: int, folder: Path, wrapped: bool, layout: RankLayout | None) -> list[Any]:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(2, 1)
    if wrapped:
        model = DistributedDataParallel(model)
    run = share_run(folder)
    train(model, run, ranks=layout)
    return [event.data for event in run.events() if event.kind == "note"]


@pytest.mark.parametrize(
    ("wrapped", "layout", "notes"),
    [
        (False, None, [{"unreduced_ranks": 2}]),
        (True, None, []),
        (False, RankLayout(shard_ranks=range(2)), []),
    ],
)
def test_ranks_whose_gradients_nothing_averages_are_noted_once(
    tmp_path: Path, wrapped: bool, layout: RankLayout | None, notes: list[Any]
) -> None:
    found = run_ranks(_notes, 2, tmp_path / "runs", wrapped, layout, folder=tmp_path / "results")
    assert found[0] == notes
