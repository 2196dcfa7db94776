"""The heartbeat reports the true state of a rank and never disturbs it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from guardrail.core.records.status import Phase, RankStatus, Status
from guardrail.core.records.verdicts import Mode
from guardrail.rundir.heartbeat import Heartbeat, resident_bytes, this_start
from guardrail.rundir.run_directory import RunDirectory
from tests.bench.reports import elsewhere, supervisor_operations
from tests.support.lab import wait_for


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo", "")


def rank(run: RunDirectory, number: int = 0) -> RankStatus:
    found = [status for status in run.read_ranks() if status.rank == number]
    assert found
    return found[0]


def status(run: RunDirectory) -> Status:
    found = run.read_status()
    assert found is not None
    return found


def test_it_beats_without_progress_and_shows_progress(run: RunDirectory) -> None:
    heart = Heartbeat(run, 3, seconds=0.01, incarnation=2).start()
    try:
        wait_for(lambda: bool(run.read_ranks()))
        first = rank(run, 3)
        assert (first.pid, first.phase, first.progress, first.incarnation) == (
            os.getpid(),
            Phase.SETUP,
            0,
            2,
        )
        assert first.memory_bytes > 1_000_000
        wait_for(lambda: rank(run, 3).heartbeat > first.heartbeat)
        assert rank(run, 3).progress == 0 and rank(run, 3).progress_time == first.progress_time
        heart.step_seconds = 0.25
        heart.at(Phase.STEP, 7)
        heart.tick()
        wait_for(lambda: rank(run, 3).progress == 2)
        after = rank(run, 3)
        assert (after.phase, after.step, after.step_seconds) == (Phase.STEP, 7, 0.25)
        assert after.progress_time > first.progress_time
    finally:
        heart.stop()
    assert run.read_status() is None, "only rank 0 reports for the run"


def test_rank_zero_keeps_what_the_supervisor_wrote(run: RunDirectory) -> None:
    run.write_status(
        Status(
            run="demo/1", phase=Phase.STARTING, supervisor_pid=77, restarts=2, started=5.0, world=4
        )
    )
    heart = Heartbeat(run, 0, seconds=0.01).start()
    heart.say("tokenizing 43 %")
    wait_for(lambda: status(run).progress == "tokenizing 43 %")
    assert status(run).phase is Phase.SETUP and status(run).pid == os.getpid()
    heart.status = lambda: Status(
        run="demo/1", phase=Phase.STEP, step=9, total_steps=20, mode=Mode.ASK
    )
    heart.at(Phase.EVAL, 9)
    wait_for(lambda: status(run).step == 9)
    heart.stop()
    now = status(run)
    assert (now.phase, now.mode, now.progress) == (Phase.EVAL, Mode.ASK, "")
    assert (now.supervisor_pid, now.restarts, now.started, now.world) == (77, 2, 5.0, 4)
    assert abs(now.heartbeat - time.time()) < 60


def test_a_new_phase_does_not_wait_for_the_next_beat(run: RunDirectory) -> None:
    heart = Heartbeat(run, 0, seconds=3600).start()
    wait_for(lambda: bool(run.read_ranks()))
    heart.at(Phase.SAVE, 4)
    wait_for(lambda: rank(run).phase is Phase.SAVE)
    heart.tick()
    heart.stop()
    assert rank(run).progress == 2, "stop writes the last state"


def test_the_last_state_is_the_end_of_the_run(run: RunDirectory) -> None:
    ended = [False]
    heart = Heartbeat(run, 0, seconds=0.01).start()
    heart.status = lambda: Status(run="demo", phase=Phase.FINISHED if ended[0] else Phase.STEP)
    heart.at(Phase.STEP, 1)
    ended[0] = True
    heart.stop()
    assert status(run).phase is Phase.FINISHED
    heart.at(Phase.STOPPED)
    heart.stop()
    assert rank(run).phase is Phase.STOPPED, "a second stop reports the later end"


def test_nothing_that_fails_gets_out_and_the_beat_goes_on(
    run: RunDirectory, tmp_path: Path
) -> None:
    heart = Heartbeat(run, 0, seconds=0.01).start()
    wait_for(lambda: bool(run.read_ranks()))
    broken = [True]

    def current_status() -> Status:
        if broken[0]:
            raise RuntimeError("rollback")
        return Status(run="demo", phase=Phase.STEP, step=5)

    heart.status = current_status
    wait_for(lambda: heart.failures > 0)
    assert heart.error == "RuntimeError: rollback"
    broken[0] = False
    wait_for(lambda: status(run).step == 5)
    hidden = tmp_path / "hidden"
    run.path.rename(hidden)
    failures = heart.failures
    wait_for(lambda: heart.failures > failures)
    hidden.rename(run.path)
    before = time.time()
    wait_for(lambda: rank(run).heartbeat > before)
    run.path.rename(hidden)
    heart.stop()


def test_starts_are_counted_over_elastic_agents(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before, own, expected in (("", "", 0), ("2", "1", 3), ("x", "4", 4)):
        monkeypatch.setenv("GUARDRAIL_INCARNATION", before)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", own)
        Heartbeat(run, 0).stop()
        assert rank(run).incarnation == expected


@pytest.mark.fault("A5")
def test_nodes_name_a_start_alike_though_the_agent_of_one_has_counted_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that was lost has a new elastic agent, which counts from 0; the other's goes on
    counting.
    """

    def start(*, port: int, count: int, store: str = "False", local: int = 1) -> str:
        variables = {
            "TORCHELASTIC_RUN_ID": "run",
            "MASTER_ADDR": "a",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
        }
        variables |= {"LOCAL_WORLD_SIZE": str(local), "TORCHELASTIC_USE_AGENT_STORE": store}
        for name, value in (variables | {"TORCHELASTIC_RESTART_COUNT": str(count)}).items():
            monkeypatch.setenv(name, value)
        return this_start()

    assert start(port=1, count=0) == start(port=1, count=2) != start(port=2, count=2)
    assert start(port=1, count=0, store="True") != start(port=1, count=1, store="True"), (
        "a meeting that is always there"
    )
    assert start(port=1, count=0, local=2) != start(port=1, count=1, local=2)


def test_memory_is_of_this_process() -> None:
    import psutil

    assert abs(resident_bytes() - psutil.Process().memory_info().rss) < 32 << 20


@pytest.mark.fault("C4", "R9")
def test_the_ranks_of_a_node_write_one_file(run: RunDirectory) -> None:
    """Also in a custom loop, without a supervisor."""
    hearts = [Heartbeat(run, rank, seconds=0.01).start() for rank in range(4)]
    for heart in hearts:
        heart.at(Phase.STEP, 7)
    wait_for(
        lambda: (
            [(one.rank, one.step) for one in run.read_ranks()] == [(rank, 7) for rank in range(4)]
        )
    )
    assert len(list((run.path / "ranks").glob("[!.]*"))) == 1
    for heart in hearts:
        heart.at(Phase.FINISHED)
        heart.stop()
    assert {one.phase for one in run.read_ranks()} == {Phase.FINISHED}
    assert len(os.listdir(run.path / "ranks")) == 1


@pytest.mark.fault("R9")
def test_a_supervisor_looks_at_its_own_ranks_only(run: RunDirectory) -> None:
    """Three looks; 16 nodes of 8 ranks."""
    elsewhere(run, 16, 8)
    assert supervisor_operations(run, 16, lambda variables: None, 1.0) < 8
