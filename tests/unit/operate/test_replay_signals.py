"""A signal ends a replay with all its processes, and its folder is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guardrail.core.errors import Interrupted
from guardrail.operate import replay
from guardrail.operate.replay_plan import ReplayPlan
from guardrail.operate.replay_signals import ReplaySignals
from guardrail.rundir.run_directory import RunDirectory

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class SignalledComparison:
    """Sends this process a signal at the first comparison, and then finds a difference."""

    number = signal.SIGTERM
    steps, missing, columns = 0, 0, ()

    def __init__(self, *_: object) -> None:
        self.first: object = None

    def compare_new_rows(self) -> None:
        os.kill(os.getpid(), self.number)
        self.first = "a difference"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The supervisors of replays, which are processes that sleep."""
    found: list[subprocess.Popen[bytes]] = []

    def start(run: RunDirectory) -> subprocess.Popen[bytes]:
        sleep = "import time; time.sleep(60)"
        found.append(subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True))
        return found[-1]

    monkeypatch.setattr(replay, "plan_replay", lambda *_: ReplayPlan(None, 0, 5))
    monkeypatch.setattr(
        replay,
        "make_scratch_run",
        lambda *_: RunDirectory.create_at(tmp_path / "scratch", ""),
    )
    monkeypatch.setattr(replay, "make_outcome", lambda *_, **__: None)
    monkeypatch.setattr(replay, "Comparison", SignalledComparison)
    monkeypatch.setattr(replay.supervisor_process, "start_supervisor", start)
    return found


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_the_processes_and_removes_the_folder(
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(SignalledComparison, "number", number)
    before = signal.signal(number, lambda *_: None)
    mine = signal.getsignal(number)
    try:
        run = RunDirectory.create(tmp_path, "run", "")
        with pytest.raises(Interrupted):
            replay.replay_run(run, report=lambda *_: None)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)
    assert started[0].poll() is not None
    assert not (tmp_path / "scratch").exists()


def test_a_signal_waits_for_the_end_of_a_held_block() -> None:
    done = []
    with ReplaySignals() as signals:
        with pytest.raises(Interrupted), signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("block")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("later signals do nothing")
    assert done == ["block", "later signals do nothing"]
