"""The rung `pause` in live runs: the ranks park and wait, whether or not a screen is open, and go
on unharmed.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.backtest.rejudge import Rejudge
from guardrail.cli.main import main
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.rundir.run_directory import RunDirectory
from tests.support.lab import wait_for
from tests.support.ranks import wait_ranks
from tests.support.running import (
    BATCH,
    BLIND,
    assert_same,
    assert_whole,
    new_run,
    of_kind,
    others_slow,
    outcome,
    spans,
    start_run,
    tiny,
    told,
    train,
    trained,
)
from trainer.config.config import Config

# whose first attempts are rejected: three call for the rollback, and the next three for the pause
STEP = 18
FIRST = (STEP - 1) * BATCH
# one batch before the onset is left out as well, and its step is done with another one
ASKED = STEP - 2
ESCALATION = [{"do": "skip"}, {"do": "rollback"}, {"do": "pause"}]


def config_of(folder: Path, *, world: int = 1, strategy: str = "ddp", **guard: Any) -> Config:
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        faults=[{"kind": "spike_loss", "first": FIRST, "last": FIRST + 6 * BATCH, "value": 50.0}],
        guard={"ladder": ESCALATION, **BLIND, **guard},
        checkpoint={"every": 8, "keep": 4},
        train={"steps": 24},
    )


def status_of(run: RunDirectory) -> Status:
    status = run.read_status()
    assert status is not None
    return status


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def parked(run: RunDirectory, world: int) -> list[int]:
    """Start the ranks and wait until they ask; their pids."""
    before = len(of_kind(run, "paused"))
    pids = start_run(run, world)
    wait_for(lambda: len(of_kind(run, "paused")) > before or ended(pids[0]), what="a pause")
    wait_for(lambda: status_of(run).phase is Phase.PAUSED or ended(pids[0]), what="its status")
    assert not ended(pids[0]), f"it has ended: {outcome(run)}"
    return pids


def stays_parked(run: RunDirectory, pids: list[int]) -> None:
    """For longer than ten meetings of the ranks, with no screen to wait for."""
    assert not run.screens()
    time.sleep(1.2)
    assert not any(map(ended, pids))
    status = status_of(run)
    assert (status.phase, status.step) == (
        Phase.PAUSED,
        ASKED,
    ) and time.time() - status.heartbeat < 30
    assert "guard.escalation" in status.question
    assert status.question.endswith("proposed: halt")


def ctl(run: RunDirectory, *words: str) -> None:
    assert main(["ctl", str(run.path), *words]) == 0


@pytest.mark.parametrize(("world", "strategy"), others_slow((2, "ddp")))
def test_it_waits_for_an_answer_through_a_kill_and_goes_on(
    tmp_path: Path, world: int, strategy: str
) -> None:
    config = config_of(tmp_path, world=world, strategy=strategy)
    run = new_run(config)
    pids = parked(run, world)
    stays_parked(run, pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_ranks(pids) == [-signal.SIGKILL] * world
    pids = parked(run, world)
    stays_parked(run, pids)
    first, again = of_kind(run, "paused")
    assert first.message == again.message and first.data["end"] == again.data["end"], (
        "the same question"
    )
    assert [one["action"] for one in again.data["proposals"]] == ["halt", "go on", "stop"]
    ctl(run, "checkpoint")
    ctl(run, "answer", "1")
    assert wait_ranks(pids) == [0] * world
    assert outcome(run) == "finished" and len(of_kind(run, "paused")) == 2
    assert [event.data["rung"] for event in of_kind(run, "rollback")] == ["rollback"]
    assert max(span.last for span in spans(run)) == FIRST + 5 * BATCH, (
        "the batch under question was applied"
    )
    assert_whole(run)
    assert_same(run, trained(told(config, run)))
    assert all(judged.agrees for judged in Rejudge(run, config.guard, own=True))


@pytest.mark.parametrize(
    ("words", "last", "left_out"), [(("skip", "2"), 7, 2), (("rollback", "10"), 6, 0)]
)
def test_it_is_answered_by_another_deed(
    tmp_path: Path, words: tuple[str, ...], last: int, left_out: int
) -> None:
    config = config_of(tmp_path)
    run = new_run(config)
    pids = parked(run, 1)
    # behind a restart, what was rejected before lies between the last update and the batch in
    # question
    if left_out:
        os.kill(pids[0], signal.SIGKILL)
        wait_ranks(pids)
        pids = parked(run, 1)
    ctl(run, *words)
    assert wait_ranks(pids) == [0] and outcome(run) == "finished"
    assert spans(run)[-1].origin == "user" and spans(run)[-1].last == FIRST + last * BATCH
    if left_out:
        assert of_kind(run, "skipped")[-1].data["count"] == left_out * BATCH, "and nothing twice"
    assert_same(run, trained(told(config, run)))


@pytest.mark.parametrize("answered", [True, False])
def test_it_halts_where_it_is_told_to_or_nobody_answers_in_time(
    tmp_path: Path, answered: bool
) -> None:
    run = new_run(config_of(tmp_path, ask_seconds=0.0 if answered else 0.5))
    if answered:
        pids = parked(run, 1)
        ctl(run, "answer", "0")
        assert wait_ranks(pids) == [0]
        assert outcome(run) == "halted"
    else:
        assert train(run, 1) == "halted"
    assert len(of_kind(run, "paused")) == 1 and status_of(run).step == ASKED


@pytest.mark.parametrize("gate", ["sync", "lagged"])
def test_the_update_under_question_is_whole_though_its_cause_was_looked_for(
    tmp_path: Path, gate: str
) -> None:
    """A replay writes to the gradients, and a person may have them applied all the same."""
    fault = {"kind": "spike_loss", "first": FIRST, "last": FIRST + BATCH, "value": 50.0}
    guard = {"ladder": [{"do": "pause"}], "gate": gate}
    config = tiny(tmp_path, faults=[fault], guard=guard, train={"steps": 22})
    run = new_run(config)
    pids = parked(run, 1)
    assert of_kind(run, "diagnosis")
    ctl(run, "answer", "1")
    assert wait_ranks(pids) == [0] and outcome(run) == "finished"
    assert not spans(run)
    plain = msgspec.structs.replace(
        config, guard=msgspec.structs.replace(config.guard, mode=Mode.OFF)
    )
    assert_same(run, trained(plain))
