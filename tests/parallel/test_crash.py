"""kill -9 at random moments: a run that is started again until it ends ends like one that nobody
disturbed.

The kills of launch, supervisor and screen are tested where those are; here ranks die, one or all,
as often as three times in one run, in the middle of skips, rollbacks, evaluations and saves.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import verify
from tests.support.ranks import wait_ranks
from tests.support.running import (
    BLIND,
    assert_same,
    assert_whole,
    new_run,
    of_kind,
    start_run,
    tiny,
    train,
    trained,
)
from trainer.config.config import Config

STEPS = 28
ROWS = 40  # that such a run writes, rejected attempts and abandoned steps included


def config_of(folder: Path, strategy: str) -> Config:
    """A skip at step 8 and two rollbacks at 15, the second in the stretch that is run again."""

    def spike(first: int, last: int) -> dict[str, object]:
        return {"kind": "spike_loss", "first": first, "last": last, "value": 50.0}

    return tiny(
        folder,
        world=2,
        strategy=strategy,
        faults=[spike(56, 64), spike(120, 144), spike(152, 176)],
        guard=BLIND,
        data={"eval_fraction": 0.1},
        train={"steps": STEPS, "eval_every": 4, "eval_batches": 1},
        snapshots={"every": 3, "keep": 3},
        checkpoint={"every": 4, "keep": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    known: dict[str, RunDirectory] = {}

    def run_of(strategy: str) -> RunDirectory:
        if strategy not in known:
            known[strategy] = run = trained(config_of(tmp_path_factory.mktemp(strategy), strategy))
            assert len(of_kind(run, "rollback")) == 2 and len(of_kind(run, "skipped")) == 5
            assert len(run.metrics()) >= ROWS
        return known[strategy]

    return run_of


def wait_for_row(run: RunDirectory, row: int, pids: list[int]) -> None:
    """Until the run has written `row` rows, or the ranks have ended."""
    while (
        len(run.metrics(["step"])) < row
        and os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.002)


def kill(victims: list[int]) -> None:
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def bury(pids: list[int]) -> None:
    """What torch elastic does when a rank has died: the others have some time to find out, then
    they are killed.
    """
    with contextlib.suppress(TimeoutError):
        wait_ranks(pids, seconds=4.0)


def trial(seed: int, undisturbed: Callable[[str], RunDirectory], folder: Path) -> None:
    dice = random.Random(seed)
    strategy = ("ddp", "ddp", "fsdp")[seed % 3]
    whole = undisturbed(strategy)
    run = new_run(config_of(folder, strategy))
    kills = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        pids = start_run(run, 2)
        if dice.random() < 0.15:
            moment = dice.uniform(0.0, 0.5)  # seconds; set-up, or the load of a checkpoint
            time.sleep(moment)
        else:
            moment = dice.randrange(ROWS)
            wait_for_row(run, moment, pids)
            time.sleep(dice.uniform(0.0, 0.03))
        victims = pids if dice.random() < 0.5 else [dice.choice(pids)]
        kills.append((moment, len(victims)))
        kill(victims)
        bury(pids)
        assert_whole(run)
        for path in checkpoint_dirs(run.checkpoints):
            verify(path)
    assert train(run, 2) == "finished", kills
    assert_whole(run)
    assert_same(run, whole)
    assert not list(run.checkpoints.glob(".*")), "temporary folders are left"


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.ci_slow) for s in range(2, 12))]
)
def test_killed_at_random(
    seed: int, undisturbed: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    trial(seed, undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(8, 16), *range(1000, 1300)])
def test_killed_at_random_sweep(
    seed: int, undisturbed: Callable[[str], RunDirectory], tmp_path: Path
) -> None:
    trial(seed, undisturbed, tmp_path)
