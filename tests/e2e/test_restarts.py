"""A run recovers from what happens to its ranks: real ranks, real collectives, the default settings
of [launch].
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from guardrail.core.records.status import Phase, Status
from guardrail.rundir import processes
from guardrail.rundir.run_directory import RunDirectory
from tests.bench.restarts import KINDS, Stage, may_mount
from tests.support.lab import Lab, wait_for

CONFIG = """
processes = 2
[tensorboard]
enabled = false
[fake]
gloo = true
steps = 100000
"""


def status_of(run: RunDirectory) -> Status:
    return run.read_status() or Status(run="", phase=Phase.STARTING)


def starts(run: RunDirectory) -> list[str]:
    return [event.kind for event in run.events() if event.kind in ("started", "restarted")]


@pytest.mark.fault("R1", "R2")
def test_killed_ranks_are_started_again_and_each_death_counts_once(lab: Lab) -> None:
    """Rank 1, then rank 0. The others wait in an all-reduce; the next start meets at a place of its
    own.
    """
    lab.write_config(CONFIG, name="gloo")
    assert lab.guardrail("launch", "c.toml", "--detach").returncode == 0
    run = lab.newest()
    for number, victim in enumerate((1, 0)):
        wait_for(lambda count=number + 1: len(starts(run)) == count, what="a start")  # type: ignore[misc]
        before = status_of(run)
        wait_for(lambda old=before: status_of(run).step > old.step + 1, what="training")  # type: ignore[misc]
        (pid,) = (
            one.pid for one in run.read_ranks() if one.rank == victim and one.incarnation == number
        )
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(starts(run)) == 3, what="the second start after a death")
    reached = status_of(run).step
    wait_for(
        lambda: status_of(run).phase is Phase.STEP and status_of(run).step > reached + 1,
        what="training",
    )
    failed = [
        (event.data["rank"], event.data["exit"])
        for event in run.events()
        if event.kind == "rank_failed"
    ]
    assert failed == [(1, -9), (0, -9)]
    assert "failure 3" not in (run.logs / "supervisor.log").read_text()
    assert len(processes.processes_of(run.path)) == 3, (
        "an agent and two ranks; nothing of the starts before"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_three_of_each_kind(kind: str, tmp_path: Path) -> None:
    if kind == "disk" and not may_mount():
        pytest.skip("only root may mount a small disk")
    stage = Stage(tmp_path)
    outcomes = [stage.run(kind, number) for number in range(3)]
    assert [(outcome.wrong, outcome.failures) for outcome in outcomes] == [("", 1)] * 3
    assert all(outcome.recovered for outcome in outcomes), outcomes
