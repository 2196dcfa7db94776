"""A run directory that is damaged, moved or slow is a sentence on the screen; no thread of it dies
without a word.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textual.pilot import Pilot

from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.operate.run_summary import RunSummary
from guardrail.rundir import journal
from guardrail.rundir.follow import Follower
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.app.run_list import RunList
from guardrail.tui.model import worker_thread
from guardrail.tui.model.health import GONE
from guardrail.tui.model.run_reader import UNREADABLE, RunReader
from guardrail.tui.model.view import View
from guardrail.tui.screens.header_footer import header_rows, status_rows
from guardrail.tui.screens.pane_keys import PaneLines
from tests.support.fake_run import FakeReader, FakeRun, example, snapshot_of
from tests.support.lab import wait_for
from tests.unit.tui.test_panels import BUILDERS, text


def small() -> FakeRun:
    return FakeRun().begin().advance(60).not_a_number().advance(70).recover().advance(80)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = small().write(tmp_path)
    found.logs.mkdir(exist_ok=True)
    (found.logs / "rank-0.log").write_text("training\n")
    return found


def shown(reader: RunReader) -> str:
    """Header and facts, two looks later, with the clock of the last heartbeat."""
    reader.look()
    reader.look()
    view = View(reader.latest(), small().time)
    return text([*header_rows(view, 200, 1), *status_rows(view, 400, 1)])


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": half,
    "garbage": lambda path: path.write_bytes(b"\x00\xff\xfe\x93NUMPY{{{" * 40 + b"\n"),
    "object": lambda path: path.write_bytes(b"{}\n"),
    "list": lambda path: path.write_bytes(b"[[[]]]\n"),
    "null": lambda path: path.write_bytes(b"null\n"),
    "newer": lambda path: path.write_bytes(
        b'{"run": "a/b", "phase": "levitating", "columns": ["x"], "kind": 7}\n'
    ),
    "missing": lambda path: path.unlink(),
    "a folder": folder_instead,
}
FILES = (
    "status.json",
    "journal.jsonl",
    "metrics.bin",
    "metrics.json",
    "config.toml",
    "logs/rank-0.log",
)


@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_drawn_and_the_run_is_read_again_afterwards(
    run: RunDirectory, file: str
) -> None:
    path = run.path / file
    before = path.read_bytes()
    for damage in DAMAGE.values():
        reader = RunReader(run)
        reader.look()
        damage(path)
        for one in (reader, RunReader(run)):  # who watches it happen, and who comes then
            one.look()
            one.look()
            view = View(one.latest(), small().time)
            assert view.snapshot.loaded
            for name, build in BUILDERS.items():
                assert build(view, 100, 20) is not None, name
        if path.is_dir():
            path.rmdir()
        path.write_bytes(before)
        assert "80 / 6,000" in shown(reader) and UNREADABLE not in reader.latest().damage


@pytest.mark.fault("T17")
def test_a_directory_that_was_moved_is_said_in_the_header_and_found_again(
    run: RunDirectory,
) -> None:
    reader = RunReader(run)
    assert "● HEALTHY" in shown(reader)
    elsewhere = run.path.with_name("elsewhere")
    run.path.rename(elsewhere)
    said = shown(reader)
    assert said.startswith(f" {GONE}") and "80 / 6,000" in said
    assert reader.latest().gone and str(run.path) in said
    elsewhere.rename(run.path)
    assert "● HEALTHY" in shown(reader) and not reader.latest().gone
    shutil.rmtree(run.path)
    assert shown(reader).startswith(f" {GONE}")


@pytest.mark.fault("T17")
@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("status.json", "empty", "✗ status.json unreadable"),
        ("status.json", "missing", "✗ status.json missing"),
        ("metrics.bin", "half", "✗ metrics.bin cut from 81 to 40 rows"),
        ("metrics.bin", "missing", "✗ metrics.bin cut from 81 to 0 rows"),
        ("metrics.json", "object", f"✗ {UNREADABLE}"),
        ("journal.jsonl", "missing", "✗ journal.jsonl missing"),
        ("journal.jsonl", "half", "✗ "),
    ],
)
def test_damage_while_it_is_watched_is_said_in_the_header(
    run: RunDirectory, file: str, damage: str, said: str
) -> None:
    reader = RunReader(run)
    reader.look()
    DAMAGE[damage](run.path / file)
    shown(reader)
    assert said in text(header_rows(View(reader.latest(), small().time), 200, 1))


@pytest.mark.fault("T17")
def test_unreadable_lines_of_the_journal_are_counted_and_are_no_incident(run: RunDirectory) -> None:
    lines = run.journal_path.read_bytes().splitlines(keepends=True)
    broken = [b"{\n", b"\xff\xfe\n", b"[1, 2]\n"]
    strange = [b'{"seq": 90, "time": 1.0, "kind": "verdict", "action": "levitate", "findings": 7}\n',
               b'{"seq": 91, "time": 1.0, "kind": "incident"}\n', b'{"seq": 92, "time": 1.0, "kind": "skipped"}\n',
               b'{"seq": 93, "time": 1.0, "kind": "rollback"}\n']  # fmt: skip
    run.journal_path.write_bytes(b"".join([*lines, *broken, *strange]))
    reader = RunReader(run)
    shown(reader)
    (damage,) = reader.latest().damage
    assert damage.split()[0] == "3"
    assert f"✗ {damage}" in text(header_rows(View(reader.latest(), 0.0), 200, 1))
    assert [one.number for one in reader.latest().story.incidents] == [1], (
        "what cannot be understood is no incident"
    )


def test_events_are_not_lost_while_the_metrics_cannot_be_read(run: RunDirectory) -> None:
    follower = Follower(run)
    (run.path / "metrics.json").write_text('{"columns": []}')
    run.append("note", "meanwhile")
    assert follower.poll().events[-1].message == "meanwhile"


def test_rows_are_read_and_not_mapped_for_the_screen(run: RunDirectory) -> None:
    """A mapped file that is cut while it is looked at ends the process by SIGBUS."""
    follower = Follower(run, most=50)
    follower.poll()
    rows = follower.fresh
    assert rows is not None and len(rows) == 50 and not isinstance(rows, np.memmap)
    half(run.metrics_path)
    assert np.isfinite(rows[:, 0]).all()
    assert len(run.rows(0, 10_000)[1]) == 40 and run.rows(70, 80)[1].shape[0] == 0


def test_parse_counts_what_is_no_event() -> None:
    events, end, unreadable = journal.parse_counted(
        b'\n{"seq":1,"time":0,"kind":"note"}\n{\n  \n{"seq"'
    )
    assert (len(events), end, unreadable) == (1, 39, 1)


# -- threads


@pytest.mark.parametrize("part", ["_look_at_status", "_look_at_file"])
def test_a_reader_that_fails_says_so_and_starts_again(
    run: RunDirectory, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", 0.01)
    reader, failing = RunReader(run), threading.Event()
    work = getattr(reader, part)
    failing.set()

    def fails() -> None:
        if failing.is_set():
            raise KeyError("absent")
        work()

    monkeypatch.setattr(reader, part, fails)
    reader.start(lambda: None)
    try:
        wait_for(lambda: reader.latest().problem.endswith(": KeyError: 'absent'"))
        assert "reader" in reader.latest().problem
        failing.clear()
        wait_for(lambda: reader.latest().series.last_step == 80)
        assert "KeyError" in reader.latest().problem, "the next look does not wipe it off"
    finally:
        reader.close()


def test_a_reading_that_fails_in_the_background_says_so(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", 0.01)
    reader = RunReader(run)
    reader.start(lambda: None)
    try:
        wait_for(lambda: reader.latest().loaded)
        with monkeypatch.context() as broken:
            broken.setattr(run, "rows", lambda first, end: {}["nothing"])
            reader.choose_signals(("loss", "lr"), "tokens")
            wait_for(lambda: reader.latest().problem.endswith(": KeyError: 'nothing'"))
            assert "zoom" in reader.latest().problem
        reader.choose_signals(("loss", "lr"), "tokens")
        wait_for(lambda: "lr" in reader.latest().series.values)
        reader.send(Command(id="a", kind="pause"))
        wait_for(lambda: bool(run.commands_pending()))
    finally:
        reader.close()


async def test_a_part_that_cannot_be_drawn_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = example()
    app = GuardrailApp(FakeReader(snapshot_of(fake)), clock=lambda: fake.time)

    def fails(self: PaneLines, view: View, width: int, height: int) -> list[Any]:
        raise ZeroDivisionError("E12")

    monkeypatch.setattr(PaneLines, "_content", fails)
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.pause()
        await pilot.press("w")
        screen = "\n".join(strip.text for strip in app.screen._compositor.render_strips())
        assert re.search(r"✗ [^\n]+: ZeroDivisionError: E12", screen) and "HEALTHY" in screen


# -- the run list


def glance(name: str, step: int = 1) -> RunSummary:
    return RunSummary(run=name, path=f"/runs/{name}", state="step", step=step, total_steps=10, exit_code=None,
                  heartbeat=0.0, host="vm", mode="auto", tokens_per_second=0.0, eta_seconds=0.0, loss=2.0)  # fmt: skip


@pytest.mark.fault("B4")
async def test_the_run_list_reads_no_curve_on_the_thread_of_its_keys() -> None:
    """300 runs on a file system that does not answer: the keys live."""
    threads: set[int] = set()
    answer = threading.Event()

    def slow(path: str) -> list[float]:
        threads.add(threading.get_ident())
        if threading.get_ident() != main:
            answer.wait(20)
        return [3.0, 2.0, 1.0]

    main = threading.get_ident()
    app = RunList(lambda: [glance(f"demo/{n:03}") for n in range(300)], root="/runs", points=slow)
    async with app.run_test(size=(140, 40)) as pilot:
        await until(pilot, lambda: bool(app.runs))
        await pilot.press("down", "down", "end")
        assert app.marked == "/runs/demo/299"
        assert main not in threads, "a curve was read on the thread of the keys"
        answer.set()
        await until(
            pilot,
            lambda: (
                "▁" in "\n".join(strip.text for strip in app.screen._compositor.render_strips())
            ),
        )


async def test_a_run_list_that_cannot_be_read_says_so() -> None:
    def look() -> list[RunSummary]:
        raise ZeroDivisionError("bad")

    app = RunList(look, root="/runs", points=lambda path: [])
    async with app.run_test(size=(100, 20)) as pilot:
        await until(pilot, lambda: "ZeroDivisionError: bad" in text(app._head(100)))


async def until(pilot: Pilot[Any], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it never came"
        await pilot.pause(0.01)


def test_a_run_that_has_ended_is_shown_so_also_without_its_status(tmp_path: Path) -> None:
    run = small().end(Phase.FINISHED, 0).write(tmp_path)
    (run.path / "status.json").unlink()
    said = shown(RunReader(run))
    assert "FINISHED" in said and "status.json missing" in said
