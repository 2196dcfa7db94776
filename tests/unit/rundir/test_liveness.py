"""Whether a run lives is not a question of whose clock is right."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guardrail.cli.main import main
from guardrail.core.errors import ExitCode, RunDirectoryError, UsageError
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import LaunchSection
from guardrail.launch import launcher as launching
from guardrail.launch.launcher import is_alive
from guardrail.launch.supervisor_journal import SupervisorJournal
from guardrail.report.build import build_report
from guardrail.rundir.run_directory import RunDirectory

FAULT = pytest.mark.fault("B8")
SLOW, FAST = (-3600.0, -45.0), (45.0, 3600.0)  # seconds of a clock that is wrong


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUARDRAIL_ROOT", raising=False)
    return RunDirectory.create(
        "runs", "far", '[run]\nname = "far"\n[train]\nsteps = 1000\n[launch]\ndevice = "cpu"\n'
    )


def status(run: RunDirectory, heartbeat: float, **changes: object) -> Status:
    return Status(
        run=run.name, phase=Phase.STEP, step=7, host="elsewhere", heartbeat=heartbeat, **changes
    )  # type: ignore[arg-type]


@contextmanager
def beating(run: RunDirectory, skew: float) -> Iterator[None]:
    """A trainer on a host whose clock is wrong by `skew` seconds."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            run.write_status(status(run, time.time() + skew))

    run.write_status(status(run, time.time() + skew))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("skew", [*(pytest.param(skew, marks=FAULT) for skew in SLOW), *FAST])
def test_a_run_on_a_host_with_another_clock_lives(
    run: RunDirectory, skew: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """For ctl, resume, runs and report."""
    with beating(run, skew):
        found = run.read_status()
        assert found is not None and is_alive(run, found)
        assert main(["ctl", run.name, "pause", "--wait", "0"]) == 0
        with pytest.raises(RunDirectoryError, match="elsewhere") as caught:
            launching.prepare_resume(run.name, (), root="runs")
        assert caught.value.kind == "running"
        capsys.readouterr()
        assert main(["runs", "--json"]) == 0
        assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["step"]
        run.append("started")
        assert build_report(run).state == "running"


@pytest.mark.parametrize("skew", [*SLOW, 45.0, pytest.param(3600.0, marks=FAULT)])
def test_a_run_that_died_there_is_dead(
    run: RunDirectory, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died when its clock showed what ours shows now, or long before or after."""
    monkeypatch.setattr("guardrail.rundir.liveness.FIRST_SECONDS", 0.3, raising=False)
    died = time.time() - 3600.0
    run.write_status(status(run, died + skew))
    os.utime(run.path / "status.json", (died, died))
    found = run.read_status()
    assert found is not None and not is_alive(run, found)


def test_attach_sees_a_run_end_on_a_host_with_another_clock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardrail.rundir.liveness.FIRST_SECONDS", 0.3)
    monkeypatch.setattr("guardrail.rundir.liveness.FRESH_SECONDS", 0.6)
    with beating(run, -300.0):
        from guardrail.rundir.liveness import HeartbeatObserver

        observer, found = HeartbeatObserver(), run.read_status()
        assert found is not None
        for _ in range(12):
            found = run.read_status()
            assert found is not None and observer(run, found)
            time.sleep(0.1)
    deadline = time.monotonic() + 30.0
    while observer(run, found := run.read_status() or found):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.fault("B8")
def test_an_end_counts_whatever_clock_has_written_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor of another node reads how the first one's rank 0 has ended the run, by an
    earlier clock.
    """
    run.append("ended", "finished", phase="finished", exit_code=0)
    chronicle = SupervisorJournal(run, LaunchSection(node_rank=1), "here", Mode.AUTO)
    assert chronicle.read_outcome_of_ranks([]) is None, "that was before"
    run.append("restarted")
    now = time.time()
    monkeypatch.setattr("guardrail.rundir.screen_files.time.time", lambda: now - 120.0)
    run.append("ended", "halted", phase="halted", exit_code=3)
    assert chronicle.read_outcome_of_ranks([]) == (Phase.HALTED, ExitCode.HALTED)


@pytest.mark.fault("B8")
@pytest.mark.parametrize("skew", [-60.0, 60.0])
def test_a_screen_on_a_host_with_another_clock_counts(
    run: RunDirectory, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        now = time.time()
        there.setattr("guardrail.rundir.screen_files.time.time", lambda: now + skew)
        run.screen_seen()
    assert run.screens() == 1
    run.screen_gone()
    assert run.screens() == 0


def test_a_command_to_a_dead_run_is_refused(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardrail.operate import control

    monkeypatch.setattr("guardrail.rundir.liveness.FIRST_SECONDS", 0.3)
    run.write_status(status(run, time.time() - 3600.0))
    with pytest.raises(UsageError, match=run.name) as caught:
        control.send_and_wait(run, Command(id="x", kind="pause"), seconds=0.0)
    assert caught.value.kind == "not_running" and run.commands_pending() == []
