"""What holds for every tracker, and that the sink feeds one that is a file and a line in the list."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from guardrail.core.events.event import Event
from guardrail.core.toml_file import read_toml
from guardrail.launch.side_threads import SideThreads
from guardrail.launch.supervisor import Supervisor
from guardrail.launch.supervisor_settings import read_settings
from guardrail.rundir import run_creation
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import SupervisorSignals
from guardrail.trackers import registry
from guardrail.trackers.base import Entry, NewConfig, Position, Purge, Row, Tracker
from guardrail.trackers.registry import TRACKERS, enabled_trackers
from guardrail.trackers.sink import Sink, write_once
from tests.support.examples.json_lines_tracker import JsonLines, read_rows
from tests.support.places import TESTS

CONFIG = "[run]\nname = 'demo'\n"
ALL = pytest.mark.parametrize("kind", [*TRACKERS, JsonLines], ids=lambda kind: kind.name)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo", CONFIG)


@pytest.fixture
def stored(tmp_path: Path) -> RunDirectory:
    """A run with a rollback, an undo, commands, a failed rank and two restarts."""
    path = tmp_path / "old" / "2026-11-30-01"
    shutil.copytree(TESTS / "cases" / "old_runs" / "before_rename", path)
    return RunDirectory.open(path)


def write_rows(run: RunDirectory, *steps: int, timeline: int = 0) -> None:
    with run.metrics_writer() as writer:
        for step in steps:
            writer.append({"step": step, "timeline": timeline, "time": 1.0 + step, "loss": 2.0})


def roll_back(run: RunDirectory, *, to: int, timeline: int) -> None:
    run.append(
        "rollback",
        "rolled back",
        step=to + 1,
        timeline=timeline - 1,
        to_step=to,
        new_timeline=timeline,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """What a tracker has written; the sink's own two files apart."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "position.json")
    }


def side_threads(run: RunDirectory) -> SideThreads:
    """The threads of the supervisor of this run."""
    settings = read_settings(run, node_rank=0, secrets={})
    return Supervisor(run, settings, SupervisorSignals())._threads


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@ALL
def test_it_has_a_name_and_says_what_it_writes(kind: type[Tracker], run: RunDirectory) -> None:
    assert kind.name.isidentifier() and kind.name == kind.name.lower()
    assert [other.name for other in TRACKERS].count(kind.name) <= 1
    taken = set(run_creation._FOLDERS) - {"tensorboard"}
    assert kind.name not in taken, "the run directory has such a folder"
    assert kind.output and kind(run).folder.parent == run.path


@ALL
def test_its_section_turns_it_off(kind: type[Tracker]) -> None:
    assert kind.is_enabled({})
    assert not kind.is_enabled({kind.name: {"enabled": False}})


@ALL
def test_without_entries_it_writes_nothing(kind: type[Tracker], run: RunDirectory) -> None:
    tracker = kind(run)
    tracker.folder.mkdir(exist_ok=True)
    tracker.open(Position())
    tracker.write([])
    tracker.close()
    assert contents(tracker.folder) == {}


@ALL
def test_a_new_process_adds_what_is_new_alone(kind: type[Tracker], run: RunDirectory) -> None:
    write_rows(run, 1, 2, 3)
    run.append("verdict", "step 4: skip", step=3)
    write_once(kind(run))
    before = contents(kind(run).folder)
    assert before
    write_once(kind(run))
    assert contents(kind(run).folder) == before
    write_rows(run, 4)
    write_once(kind(run))
    after = contents(kind(run).folder)
    assert after != before
    assert all(after[name].startswith(data) for name, data in before.items()), "appended, not again"


@ALL
def test_a_full_disk_leaves_all_or_nothing(kind: type[Tracker], run: RunDirectory) -> None:
    sink = Sink(kind(run))
    kind(run).folder.mkdir(exist_ok=True)
    write_rows(run, 1, 2, 3)
    sink.write_new()
    before = contents(kind(run).folder)
    write_rows(run, *range(4, 200))
    with full_disk(max(map(len, before.values())) + 100), pytest.raises(OSError):
        sink.write_new()
    assert contents(kind(run).folder) == before
    sink.write_new()
    sink.close()
    after = contents(kind(run).folder)
    assert sum(map(len, after.values())) > sum(map(len, before.values()))


@ALL
def test_it_takes_a_stored_run(kind: type[Tracker], stored: RunDirectory) -> None:
    write_once(kind(stored))
    assert contents(kind(stored).folder)


def test_the_registered_trackers_load_without_torch_or_numpy() -> None:
    code = (
        "import sys, guardrail.trackers.registry\n"
        "heavy = {'numpy', 'torch', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


# -- the example


def test_a_line_in_the_list_is_all_that_a_new_tracker_needs(
    stored: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TRACKERS", (*registry.TRACKERS, JsonLines))
    config = read_toml(stored.path / "config.toml", of_run=True)
    assert JsonLines in enabled_trackers(config)
    with side_threads(stored).feed_trackers():
        pass  # the ranks would run here
    view = stored.metrics()
    is_current = view.current()
    rows = read_rows(stored.path / "json_lines" / "run.jsonl")
    assert 0 < len(rows) == is_current.sum() < len(view)
    assert [row["step"] for row in rows] == view.column("step")[is_current].tolist()
    np.testing.assert_array_equal([row["loss"] for row in rows], view.column("loss")[is_current])


# -- the sink


class Recorder(Tracker):
    """Keeps what it is given, or fails."""

    name = "recorder"
    output = "records"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run)
        self.opened: list[Position] = []
        self.entries: list[Entry] = []
        self.error: Exception | None = None
        self.is_closed = False

    def open(self, position: Position) -> None:
        self.opened.append(position)

    def write(self, entries: Sequence[Entry]) -> None:
        if self.error is not None:
            raise self.error
        self.entries += entries

    def close(self) -> None:
        self.is_closed = True

    def short(self) -> list[str]:
        """Each entry as a word: "purge 3", "row 4", "rollback", "config"."""
        words = []
        for entry in self.entries:
            match entry:
                case Purge(step):
                    words.append(f"purge {step}")
                case NewConfig():
                    words.append("config")
                case Row(values):
                    words.append(f"row {values['step']:.0f}")
                case Event():
                    words.append(entry.kind)
        return words


def test_entries_come_in_order_and_a_rollback_purges(run: RunDirectory) -> None:
    tracker = Recorder(run)
    tracker.folder.mkdir()
    sink = Sink(tracker)
    write_rows(run, 1, 2, 3)
    sink.write_new()
    assert tracker.short() == ["purge 0", "config", "row 1", "row 2", "row 3"]
    tracker.entries.clear()
    roll_back(run, to=1, timeline=1)
    write_rows(run, 2, timeline=1)
    sink.write_new()
    assert tracker.short() == ["purge 2", "rollback", "row 2"]
    sink.close()
    assert tracker.is_closed and tracker.opened == [Position()]


def test_entries_that_were_not_written_come_again_with_the_new_ones(run: RunDirectory) -> None:
    tracker = Recorder(run)
    tracker.folder.mkdir()
    sink = Sink(tracker)
    write_rows(run, 1, 2)
    run.append("verdict", "step 3: skip", step=2)
    tracker.error = OSError(28, "No space left on device")
    sink.try_write_new()
    write_rows(run, 3)
    tracker.error = None
    sink.try_write_new()
    assert tracker.short() == ["purge 0", "config", "verdict", "row 1", "row 2", "row 3"]
    assert len(tracker.opened) == 1


def test_a_new_process_opens_at_the_position_of_the_last_one(run: RunDirectory) -> None:
    write_rows(run, 1, 2)
    run.append("verdict", "step 3: skip", step=2)
    write_once(Recorder(run))
    tracker = Recorder(run)
    write_rows(run, 3)
    write_once(tracker)
    assert [(position.rows, position.seq) for position in tracker.opened] == [(2, 1)]
    assert tracker.short() == ["purge 3", "row 3"]


def test_rows_that_cannot_be_read_yet_are_waited_for(run: RunDirectory) -> None:
    tracker = Recorder(run)
    tracker.folder.mkdir()
    sink = Sink(tracker)
    write_rows(run, 1)
    run.append("verdict", "step 2: skip", step=1)
    columns = run.path / "metrics.json"
    stored = columns.read_bytes()
    columns.write_text("{")
    sink.try_write_new()
    assert tracker.short() == []
    columns.write_bytes(stored)
    sink.try_write_new()
    assert tracker.short() == ["purge 0", "config", "verdict", "row 1"]


def test_a_tracker_with_a_fault_is_noted_in_the_journal_and_the_others_go_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Faulty(JsonLines):
        name = "faulty"
        output = "faulty lines"

        def write(self, entries: Sequence[Entry]) -> None:
            raise RuntimeError("a fault")

    write_rows(run, 1, 2)
    monkeypatch.setattr(registry, "TRACKERS", (Faulty, JsonLines))
    with side_threads(run).feed_trackers():
        threading.Event().wait(0.1)
    (note,) = run.events()
    assert note.kind == "note" and note.data["text"] == "faulty"
    assert len(read_rows(run.path / "json_lines" / "run.jsonl")) == 2
