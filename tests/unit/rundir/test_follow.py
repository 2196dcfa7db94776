"""A follower sees each event and row once, in whatever pieces they reach the disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.core.records.status import Phase, Status
from guardrail.rundir import follow
from guardrail.rundir.follow import Follower
from guardrail.rundir.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo", "")


def write_rows(run: RunDirectory, *rows: tuple[int, int]) -> None:
    with run.metrics_writer() as writer:
        for step, timeline in rows:
            writer.append({"step": step, "timeline": timeline})


def test_a_run_without_files_is_quiet(tmp_path: Path) -> None:
    with Follower(RunDirectory(tmp_path / "not-there-yet")) as follower:
        assert not follower.poll() and follower.poll().rows == (0, 0)
        follower.wait(0.01)


def test_each_event_and_row_comes_once(run: RunDirectory) -> None:
    follower = Follower(run)
    assert not follower.poll()
    run.append("note", "one")
    write_rows(run, (1, 0), (2, 0))
    update = follower.poll()
    assert [e.message for e in update.events] == ["one"] and update.rows == (0, 2)
    assert not follower.poll()
    run.append("note", "two")
    write_rows(run, (3, 0))
    update = follower.poll()
    assert [e.message for e in update.events] == ["two"] and update.rows == (2, 3)
    assert follower.view is not None and follower.view.column("step")[2:3].tolist() == [3]


def test_what_is_known_already_is_not_given_again(run: RunDirectory) -> None:
    for n in range(5):
        run.append("note", str(n))
    write_rows(run, (1, 0), (2, 0), (3, 0))
    follower = Follower(run, seq=3, row=2)
    update = follower.poll()
    assert [e.seq for e in update.events] == [4, 5] and update.rows == (2, 3)


def test_a_torn_line_and_a_torn_row_wait_for_their_rest(run: RunDirectory) -> None:
    run.append("note", "whole")
    write_rows(run, (1, 0))
    lines, rows = run.journal_path.read_bytes(), run.metrics_path.read_bytes()
    run.journal_path.write_bytes(b"")
    run.metrics_path.write_bytes(b"")
    follower = Follower(run)
    seen: list[int] = []
    for end in range(0, len(lines) + 1, 7):
        run.journal_path.write_bytes(lines[:end])
        run.metrics_path.write_bytes(rows[: end if end < len(rows) else -1])
        update = follower.poll()
        assert not update.events or end == len(lines)
        seen += [e.seq for e in update.events]
    run.journal_path.write_bytes(lines)
    run.metrics_path.write_bytes(rows)
    update = follower.poll()
    assert seen + [e.seq for e in update.events] == [1] and update.rows == (0, 1)


def test_a_torn_line_that_the_writer_cuts_off_is_never_given(run: RunDirectory) -> None:
    run.append("note", "first")
    follower = Follower(run)
    follower.poll()
    with run.journal_path.open("ab") as file:
        file.write(b'{"seq": 2, "torn": "' + b"x" * 300)
    assert not follower.poll()
    run.append("note", "next")
    assert [e.message.split()[0] for e in follower.poll().events] == ["cut", "next"]


def test_only_what_is_new_is_read(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower(run)
    sizes: list[int] = []
    parse = follow.journal.parse_counted
    monkeypatch.setattr(
        follow.journal, "parse_counted", lambda data: (sizes.append(len(data)), parse(data))[1]
    )
    for n in range(4):
        before = run.journal_path.stat().st_size if n else 0
        run.append("note", "x" * 100)
        sizes.clear()  # appending reads as well
        follower.poll()
        assert sizes == [run.journal_path.stat().st_size - before]
    sizes.clear()
    follower.poll()
    assert sizes == [0]


def test_the_present_is_followed_across_rollbacks(run: RunDirectory) -> None:
    follower = Follower(run)

    def present() -> list[float]:
        follower.poll()
        view = follower.view
        assert view is not None
        mask = view.current(follower.timelines)
        assert mask.tolist() == run.metrics().current().tolist()
        return view.column("step")[mask].tolist()

    write_rows(run, (1, 0), (2, 0), (3, 0))
    assert present() == [1, 2, 3]
    run.append("rollback", to_step=1, new_timeline=1)
    assert present() == [1]
    write_rows(run, (2, 1))
    assert present() == [1, 2]
    write_rows(run, (1, 2))  # a restart that never reached the journal
    assert present() == [1]
    write_rows(run, (2, 2), (3, 2))
    assert present() == [1, 2, 3]


@pytest.mark.parametrize("watching", [True, False])
@pytest.mark.parametrize("what", ["event", "row", "status"])
def test_waiting_ends_with_a_change(run: RunDirectory, what: str, watching: bool) -> None:
    with Follower(run) as follower:
        follower._can_watch = watching
        follower.poll()
        assert follower.wait(0.05) is False
        assert (follower._watch is not None) == watching

        def change() -> None:
            if what == "event":
                run.append("note")
            elif what == "row":
                write_rows(run, (1, 0))
            else:
                run.write_status(Status(run="demo", phase=Phase.STEP))

        timer = threading.Timer(0.1, change)
        timer.start()
        assert follower.wait(60) is True
        timer.join()
        assert bool(follower.poll()) == (what != "status")


def test_a_change_that_was_there_before_the_wait_is_not_slept_through(run: RunDirectory) -> None:
    with Follower(run) as follower:
        follower.poll()
        run.append("note")
        assert follower.wait(0) is True


def test_where_notices_do_not_come_it_looks_by_itself(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared file system takes the watch and never reports what another machine wrote."""
    monkeypatch.setattr(follow, "CHECK_SECONDS", 0.02)
    with Follower(run) as follower:
        for n in range(4):
            follower.poll()
            follower._start_watch()
            if follower._watch is not None:
                monkeypatch.setattr(
                    follower._watch, "wait", lambda seconds: threading.Event().wait(seconds)
                )
            timer = threading.Timer(0.05, lambda n=n: run.append("note", str(n)))
            timer.start()
            assert follower.wait(60) is True
            timer.join()
        assert follower._watch is None and not follower._can_watch


def test_without_watchdog_it_looks_by_itself(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "watchdog.observers", None)
    with Follower(run) as follower:
        follower.poll()
        timer = threading.Timer(0.05, lambda: run.append("note"))
        timer.start()
        assert follower.wait(60) is True
        assert follower._watch is None
        timer.join()


def test_a_million_rows_are_learnt_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(run, (1, 0))
    with run.metrics_path.open("r+b") as file:
        file.truncate(1_000_000 * 8 * len(METRIC_COLUMNS))
    follower = Follower(run)
    assert follower.poll().rows == (0, 1_000_000)
    lengths: list[int] = []
    monkeypatch.setattr(
        follower.timelines, "add_rows", lambda steps, timelines, **_: lengths.append(len(steps))
    )
    write_rows(run, (2, 1))
    assert follower.poll().rows == (1_000_000, 1_000_001) and lengths == [2]
