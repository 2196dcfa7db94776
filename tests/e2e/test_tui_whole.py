"""One real run, from launch to stop, by somebody who sits at a terminal; each deed is looked up in
the journal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guardrail.core.events.event import Event
from guardrail.core.records.status import Phase
from guardrail.rundir.run_directory import RunDirectory
from tests.support.lab import Lab, wait_for
from tests.support.terminal import Terminal

CONFIG = """
[run]
name = "sat"
[launch]
processes = 1
device = "cpu"
threads = 1
[data]
sources = ["corpus"]
sequence_length = 32
eval_fraction = 0.0
cache = "cache"
[model]
layers = 1
width = 16
heads = 2
dropout = 0.0
[train]
steps = 1000000
batch_size = 4
micro_batch_size = 4
[guard]
mode = "advise"
[snapshots]
every = 50
keep = 40
[checkpoint]
every = 100000
[tensorboard]
enabled = false
"""


class Seat:
    """A person at a terminal: types, looks, and closes it."""

    def __init__(self, lab: Lab, *command: str) -> None:
        self.terminal = Terminal(
            [sys.executable, "-m", "guardrail", *command],
            columns=120,
            rows=32,
            environment=lab.environment(),
            cwd=lab.folder,
        )

    def sees(self, *texts: str) -> None:
        self.terminal.shows(*texts, seconds=90.0)

    def types(self, keys: str, *then: str) -> None:
        self.terminal.press(keys)
        self.sees(*then)

    def until(self, true: Callable[[], object], what: str) -> None:
        """Keep reading, as a terminal does, until something is true."""
        wait_for(lambda: (self.terminal.take(0.02), true())[1], what=what, seconds=90.0)


def answer(run: RunDirectory, command: str) -> Event | None:
    """The newest answer to a command of a kind."""
    found = [
        event
        for event in run.events()
        if event.kind == "command" and event.data.get("command") == command
    ]
    return found[-1] if found else None


def applied(run: RunDirectory, command: str) -> Callable[[], bool]:
    def there() -> bool:
        found = answer(run, command)
        return found is not None and found.data["effect"] == "applied"

    return there


def step(run: RunDirectory) -> int:
    status = run.read_status()
    return status.step if status is not None else 0


@pytest.fixture
def at_home(lab: Lab) -> Lab:
    (lab.folder / "corpus").mkdir()
    # more than a run can go back over while a dialog is open: it may not leave all data out
    for number in range(200):
        (lab.folder / "corpus" / f"{number}.txt").write_text(Path(__file__).read_text()[number:])
    (lab.folder / "sat.toml").write_text(CONFIG)
    return lab


def test_a_run_from_launch_to_stop(at_home: Lab) -> None:
    seat = Seat(at_home, "launch", "sat.toml")
    try:
        run = at_home.newest()
        control(seat, run)
        seat.terminal.press("q")
        assert seat.terminal.ends(30.0) == 0
        assert "training continues" in "\n".join(seat.terminal.display())
        left = step(run)
        wait_for(lambda: step(run) > left, what="the run goes on when the screen is left")
    finally:
        seat.terminal.end()
    closed_window(at_home, run)
    come_back_and_stop(at_home, run)


def control(seat: Seat, run: RunDirectory) -> None:
    """Watch, pause, go on, roll back, change the rate: by the keys that the footer names."""
    seat.sees("HEALTHY", "gradient norm", "? help")
    seat.until(lambda: step(run) > 120, "two snapshots")
    seat.types("p", "PAUSED")
    seat.until(applied(run, "pause"), "the pause is in the journal")
    parked = step(run)
    seat.types("p", "HEALTHY")
    seat.until(applied(run, "resume"), "so is its end")
    seat.until(lambda: step(run) > parked, "it has gone on")

    go_back(seat, run)
    seat.until(
        lambda: any(event.kind == "rollback" for event in run.events()), "what it did is there too"
    )
    back = next(event for event in run.events() if event.kind == "rollback")
    assert back.data["to_step"] < back.data["from_step"] and back.data["new_timeline"] == 1
    seat.sees("timeline 1")

    seat.types("l", "Factor on the scheduled learning rate")
    seat.types("\r", "rate ×0.5?")
    seat.terminal.press("y")
    seat.until(applied(run, "lr"), "the rate is in the journal")
    seat.sees("rate ×0.5 since")
    for command in ("pause", "resume", "rollback", "lr"):
        found = answer(run, command)
        assert found is not None and "@" in found.data["who"], "who did it"


def go_back(seat: Seat, run: RunDirectory) -> None:
    """Roll back by the dialog. What it showed may not hold any more on a machine that is slow to
    draw: then again.
    """
    refused: list[str] = []
    while len(refused) < 3:
        before = answer(run, "rollback")
        seat.types("r", "roll back to")
        seat.types("\r", "roll back to step", "No")
        assert answer(run, "rollback") == before, "nothing is sent before it is confirmed"
        seat.terminal.press("y")
        seat.until(
            lambda before=before: answer(run, "rollback") != before,
            "the rollback is answered in the journal",
        )
        if applied(run, "rollback")():
            return
        found = answer(run, "rollback")
        assert found is not None
        refused.append(found.message)
    raise AssertionError(f"refused three times: {refused}")


def closed_window(lab: Lab, run: RunDirectory) -> None:
    """The window of another screen is closed without a word."""
    seat = Seat(lab, "attach", run.name)
    try:
        seat.sees("HEALTHY", "rate ×0.5")
        seat.terminal.close()
        assert seat.terminal.ends(30.0) == 0
    finally:
        seat.terminal.end()
    left = step(run)
    wait_for(lambda: step(run) > left, what="a closed window changes nothing")


def come_back_and_stop(lab: Lab, run: RunDirectory) -> None:
    seat = Seat(lab, "attach", run.name)
    try:
        seat.sees("HEALTHY", "timeline 1")
        seat.types("S", "stop?", "saves a checkpoint")
        seat.terminal.press("\r")  # the default is No
        seat.sees("S stop")
        assert answer(run, "stop") is None
        seat.types("S", "stop?")
        seat.terminal.press("y")
        seat.until(lambda: run.events()[-1].kind == "ended", "the run ends")
        seat.sees("STOPPED")
        seat.terminal.press("q")
        assert seat.terminal.ends(30.0) == 0
    finally:
        seat.terminal.end()
    status, stopped = run.read_status(), answer(run, "stop")
    assert status is not None and status.phase is Phase.STOPPED
    assert stopped is not None and stopped.data["effect"] == "applied"
    kept = [Path(folder).name for folder in (run.path / "checkpoints").iterdir()]
    assert any(f"{status.step:08d}" in name for name in kept), "its last step is on disk"
