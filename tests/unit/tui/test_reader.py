"""From a run directory on disk to snapshots, and commands back."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase, Status
from guardrail.operate.run_state import RunState
from guardrail.rundir.command_files import check_command
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model import curve_reader, run_reader, worker_thread
from guardrail.tui.model.run_reader import RunReader
from tests.support.fake_run import FakeRun, LiveRun, example, snapshot_of
from tests.support.lab import wait_for


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return example().write(tmp_path)


@pytest.fixture
def reading(run: RunDirectory) -> Iterator[RunReader]:
    reader = RunReader(run)
    reader.start(lambda: None)
    yield reader
    reader.close()


def test_a_run_on_disk_reads_as_it_was_written(run: RunDirectory) -> None:
    reader = RunReader(run, clock=lambda: 0.0)
    assert not reader.latest().loaded and reader.latest().name == run.name
    reader.look()
    found, expected = reader.latest(), snapshot_of(example())
    assert found.status == expected.status and found.loaded and found.problem == ""
    assert repr(found.story) == repr(expected.story), "repr, since a NaN is not equal to itself"
    assert found.series.step.tolist() == expected.series.step.tolist()
    assert len(found.series.abandoned) == 1


def test_only_news_is_published(run: RunDirectory) -> None:
    reader = RunReader(run)
    reader.look()
    before = reader.latest()
    reader.look()
    assert reader.latest() is before
    run.append("note", "something")
    reader.look()
    assert reader.latest().story.lines[-1].text == "something"
    assert reader.latest().series is before.series


def test_further_signals_and_another_axis_come_by_choice(
    run: RunDirectory, reading: RunReader
) -> None:
    wait_for(lambda: reading.latest().loaded)
    plain = reading.latest()
    assert "lr" in plain.columns and "lr" not in plain.series.values and not plain.series.axes
    run.append(
        "rollback", "rolled back to 1000", to_step=1000, new_timeline=2, timeline=1, step=1284
    )
    wait_for(lambda: reading.latest().series.last_step == 1000)
    reading.choose_signals(("loss", "lr", "throughput"), "tokens")
    wait_for(lambda: "lr" in reading.latest().series.values)
    series, expected = reading.latest().series, snapshot_of(example()).series
    assert series.values["lr"].tolist() == expected.values["lr"][: len(series)].tolist()
    assert series.along("tokens").tolist() == expected.along("tokens")[: len(series)].tolist()
    assert series.last_step == 1000 and len(series.abandoned) == 2, "what was left stays left"
    reading.choose_signals(("loss",), "step")
    reading.choose_signals(("loss", "lr"), "tokens")
    reading.send(Command(id="after", kind="pause"))  # comes after both on the same thread
    wait_for(lambda: bool(run.commands_pending()))
    assert reading.latest().series is series, "what is kept already is not read again"


def test_a_rollback_is_true_before_the_first_row_after_it(run: RunDirectory) -> None:
    """A paused run that is rolled back writes no row for hours."""
    reader = RunReader(run)
    reader.look()
    run.append(
        "rollback", "rolled back to 1000", to_step=1000, new_timeline=2, timeline=1, step=1284
    )
    reader.look()
    series = reader.latest().series
    assert series.last_step == 1000
    assert [one.last_step for one in series.abandoned] == [1207, 1284]


def test_many_rows_arrive_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve_reader, "CHUNK_ROWS", 100)
    monkeypatch.setattr(run_reader, "CHUNK_ROWS", 100)
    run = example().write(tmp_path)
    reader = RunReader(run)
    lengths: list[int] = []
    reader._latest.notify = lambda: lengths.append(len(reader.latest().series))
    reader.look()
    assert len(set(lengths)) > 10 and reader.latest().series.last_step == 1284


def test_a_directory_that_cannot_be_read_says_so_and_comes_back(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = RunReader(run)

    def stale() -> Status | None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as broken:
        broken.setattr(run, "read_status", stale)
        reader.look()
        assert "Stale file handle" in reader.latest().problem
    reader.look()
    assert reader.latest().problem == "" and reader.latest().status is not None


def test_columns_that_cannot_be_read_are_a_problem_and_not_a_crash(run: RunDirectory) -> None:
    (run.path / "metrics.json").write_text("{}")
    reader = RunReader(run)
    reader.look()
    assert "metrics.json" in reader.latest().problem and reader.latest().status is not None


def test_silence_counts_from_the_last_new_heartbeat_by_our_own_clock(run: RunDirectory) -> None:
    """The clock of the training machine is an hour ahead of ours, or an hour late."""
    now = 1000.0
    for offset in (3600.0, -3600.0):
        reader = RunReader(run, clock=lambda: now)
        status = example().status
        run.write_status(msgspec.structs.replace(status, heartbeat=now + offset))
        reader.look()
        assert reader.latest().heard == min(now, now + offset), (
            "what lay there when we came may be old"
        )
        run.write_status(msgspec.structs.replace(status, heartbeat=now + offset + 1))
        reader.look()
        assert reader.latest().heard == now


def test_commands_go_into_the_inbox_and_answers_come_back(
    run: RunDirectory, reading: RunReader
) -> None:
    reading.send(Command(id="mine", kind="lr", value=0.5, who="me@here", time=1.0))
    wait_for(lambda: [c.id for c in run.commands_pending()] == ["mine"])
    run.answer(run.commands_pending()[0], applied=True, step=1290)
    wait_for(lambda: "mine" in reading.latest().story.answers)
    assert reading.latest().story.answers["mine"].step == 1290


def test_a_command_that_cannot_be_handed_in_is_said(run: RunDirectory, reading: RunReader) -> None:
    wrong = Command(id="wrong", kind="lr", value=-1.0)
    reading.send(wrong)
    wait_for(lambda: "wrong" in reading.latest().unsent)
    assert reading.latest().unsent == {"wrong": check_command(wrong)}


def test_presence_is_shown_and_taken_back(run: RunDirectory) -> None:
    assert run.screens() == 0
    reader = RunReader(run)
    reader.start(lambda: None)
    wait_for(lambda: run.screens() == 1)
    reader.close()
    assert run.screens() == 0


def test_who_may_not_answer_is_not_present(run: RunDirectory) -> None:
    """A run out of budget asks whoever watches; a read-only screen cannot answer."""
    reader = RunReader(run, present=False)
    reader.start(lambda: None)
    wait_for(lambda: reader.latest().loaded)
    reader.close()
    assert run.screens() == 0


def test_a_run_that_has_ended_is_not_written_to(tmp_path: Path) -> None:
    run = example().end(Phase.FINISHED, 0).write(tmp_path)
    reader = RunReader(run)
    reader.look()
    reader._show_presence()
    assert run.screens() == 0


def test_news_is_reported(run: RunDirectory, reading: RunReader) -> None:
    notified = threading.Event()
    wait_for(lambda: reading.latest().loaded)
    reading._latest.notify = notified.set
    run.append("note", "something")
    assert notified.wait(10)


def test_a_live_run_is_followed(tmp_path: Path) -> None:
    fake = FakeRun(total=140).begin().advance(100)
    run = fake.write(tmp_path)
    reader = RunReader(run)
    reader.start(lambda: None)
    try:
        LiveRun(fake, run, rate=200, spike_every=0).go(20)
        wait_for(lambda: reader.latest().series.last_step == 140)
        wait_for(
            lambda: (
                (status := reader.latest().status) is not None and status.phase is Phase.FINISHED
            )
        )
    finally:
        reader.close()


def test_an_empty_directory_is_quiet(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "new", "")
    reader = RunReader(run)
    reader.look()
    found = reader.latest()
    assert found.status is None and found.loaded and not found.problem and len(found.series) == 0


@pytest.mark.fault("B3")
def test_a_failing_preview_stops_no_command(
    run: RunDirectory, reading: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails in a thread of the screen is said, and the thread goes on with the next
    thing.
    """

    def damaged(*given: object, **named: object) -> RunState:
        raise KeyError("slowest_rank")

    monkeypatch.setattr(RunState, "read", damaged)
    reading.preview(Command(id="shown", kind="undo", value=1.0))
    reading.send(Command(id="sent", kind="pause"))
    wait_for(lambda: [command.id for command in run.commands_pending()] == ["sent"], seconds=20)
    wait_for(lambda: "shown" in reading.latest().previews)
    assert "KeyError: 'slowest_rank'" in reading.latest().previews["shown"].remark


@pytest.mark.fault("B3")
@pytest.mark.parametrize("what", ["send", "screen_seen", "write_event"])
def test_threads_of_the_screen_outlive_whatever_happens(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    works, failing = getattr(RunDirectory, what), True

    def sometimes(*given: object, **named: object) -> object:
        if failing:
            raise ZeroDivisionError("a mistake")
        return works(*given, **named)

    monkeypatch.setattr(RunDirectory, what, sometimes)
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", 0.01)
    monkeypatch.setattr(worker_thread, "LONGEST_RESTART_SECONDS", 0.05)
    monkeypatch.setattr(run_reader, "PRESENCE_SECONDS", 0.0)
    reader = RunReader(run)
    reader.start(lambda: None)
    try:
        wait_for(lambda: reader.latest().loaded)
        reader.send(Command(id="first", kind="pause"))
        reader.write_note("a note")
        said = {
            "send": lambda: "a mistake" in reader.latest().unsent.get("first", ""),
            "screen_seen": lambda: "reader" in reader.latest().problem,
            "write_event": lambda: "a mistake" in reader.latest().problem,
        }
        wait_for(said[what])
        failing = False
        reader.send(Command(id="second", kind="pause"))
        reader.write_note("another note")
        wait_for(lambda: "second" in {command.id for command in run.commands_pending()})
        wait_for(lambda: reader.latest().story.lines[-1].text == "another note")
    finally:
        reader.close()
