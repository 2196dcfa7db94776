"""`guardrail runs`: what a glance at a run says, the table, and the chooser."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.cells import cell_len

from guardrail.cli.main import main
from guardrail.cli.runs import format_last_sign
from guardrail.core.records.status import Phase, Status
from guardrail.operate.run_summary import RunSummary, read_losses, summarize_run, summarize_runs
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.app.run_list import RunList, draw_curve, draw_run, matching_runs
from guardrail.tui.draw.lines import Row
from tests.support.fake_run import FakeRun, example

HOSTILE = "a\x1b]52;c;eA==\x07\x9b2J[red]\u202e語" + "x" * 300


def alive(run: RunDirectory, status: Status) -> bool:
    return True


def text(row: Row) -> str:
    return "".join(piece for piece, _ in row)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one that trains, one that asks, one that has ended."""
    folder = tmp_path_factory.mktemp("runs")
    FakeRun(name="ended/x").begin().advance(500).end(Phase.FINISHED, 0).write(folder)
    FakeRun(name="asks/x").begin().advance(300).ask("go back?").write(folder)
    example().write(folder)
    return folder


def test_a_glance_says_how_a_run_is(root: Path) -> None:
    found = {one.run.split("/")[0]: one for one in summarize_runs(root, alive)}
    assert {name: one.state for name, one in found.items()} == {
        "ended": "finished", "asks": "asking", "quickstart": "step",
    }  # fmt: skip
    one = found["quickstart"]
    assert (one.step, one.total_steps, one.mode, one.host) == (1284, 6000, "auto", "node-1")
    assert one.loss == pytest.approx(2.3, abs=0.3) and one.tokens_per_second > 0
    assert found["ended"].exit_code == 0 and found["ended"].tokens_per_second == 0
    (lost,) = (
        one for one in summarize_runs(root, lambda run, status: False) if one.run.startswith("asks")
    )
    assert (lost.state, lost.eta_seconds) == ("lost", 0)


def test_points_are_of_the_present_and_end_with_the_last_step(tmp_path: Path) -> None:
    """The rejected updates of a spike and the steps that its rollback discarded are no part of the
    curve.
    """
    fake = FakeRun().begin().advance(400)
    run = fake.spike(back_to=300).advance(310).write(tmp_path)
    rows = fake.rows
    assert max(rows[:, 5]) > 9, "the spike is in the file"
    points = read_losses(run, len(rows))
    assert len(points) == 310 and max(points[100:]) < 5
    for count in (1, 2, 7, 40):
        few = read_losses(run, count)
        assert 1 <= len(few) <= count and few[-1] == rows[-1, 5]


def test_points_of_what_is_no_run_yet_are_none(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "new", "")
    assert read_losses(run, 5) == [] and summarize_run(run, alive).state == "new"
    (run.path / "metrics.json").write_bytes(b"\xff{")
    (run.path / "metrics.bin").write_bytes(b"torn")
    (run.path / "status.json").write_bytes(b"[")
    assert read_losses(run, 5) == [] and summarize_run(run, alive).loss is None


def test_json_has_numbers_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FakeRun().begin().advance(20).not_a_number().write(tmp_path)
    assert main(["runs", "--json", "--root", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["step"] == 20 and run["loss"] > 2 and Path(run["path"]).is_dir()


def test_the_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(root)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["RUN", "STATE", "STEP", "LOSS"] and len(rows) == 3
    assert any("1,284 / 6,000" in line for line in rows)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("state", ["step", "lost", "asking", "finished", "of a newer version"])
def test_rows_fit_and_say_the_state(width: int, state: str) -> None:
    one = RunSummary(
        HOSTILE, "/r", state, 1_284_000, 6_000_000, None, 1000.0, "h", "auto", 8e3, 60.0, 2.2
    )
    for points in ([], [math.nan] * 50, [3.0, 2.0, 99.0, math.inf]):
        row = draw_run(one, points, name=30, width=width, now=1500.0, marked=True)
        assert cell_len(text(row)) <= width and "\x1b" not in text(row) and "\x9b" not in text(row)
    if width >= 80:
        assert "1,284,000 / 6,000,000" in text(row)


@pytest.mark.parametrize(
    ("points", "shown"),
    [
        ([], ""),
        ([2.0, 2.0], "▁▁"),
        ([4.0, 3.0, 2.0], "█▅▁"),
        ([math.nan, math.inf], "××"),
        ([*[2.0 + 0.1 * (i % 2) for i in range(10)], 40.0], "▁█▁█▁█▁█▁█▲"),
    ],
)
def test_curves(points: Sequence[float], shown: str) -> None:
    assert draw_curve(points, 20) == shown
    assert len(draw_curve(points, 2)) <= 2


def test_filter_looks_at_names_hosts_and_states() -> None:
    runs = [RunSummary(name, f"/{name}", state, 1, 2, None, 0.0, "node-1", "auto", 0.0, 0.0, None)
            for name, state in (("gpt/1", "step"), ("gpt/2", "failed"), ("bert/1", "step"))]  # fmt: skip
    assert [one.run for one in matching_runs(runs, "gpt training")] == ["gpt/1"]
    assert len(matching_runs(runs, "NODE")) == 3 and not matching_runs(runs, "nowhere")


async def test_choosing_with_the_keys(root: Path) -> None:
    runs = summarize_runs(root, alive)
    app = RunList(lambda: runs, root=str(root), clock=lambda: time.time())
    async with app.run_test(size=(100, 20)) as pilot:
        await pilot.pause(0.1)
        await pilot.press("down", "down", "down", "up")
        assert app.marked == runs[1].path
        runs.insert(0, replace(runs[0], path="/new", run="new/1"))
        await pilot.press("slash", *"quick", "q", "backspace")
        assert app.words == "quick" and [one.run.split("/")[0] for one in app.shown] == [
            "quickstart"
        ]
        await pilot.press("enter", "enter")
    assert app.return_value is not None and Path(app.return_value).parent.name == "quickstart"


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
async def test_leaving_chooses_nothing(root: Path, key: str) -> None:
    app = RunList(lambda: [], root=str(root))
    async with app.run_test(size=(60, 10)) as pilot:
        await pilot.press("enter", "escape", key)
    assert app.return_value is None


async def test_a_root_that_cannot_be_read_is_said() -> None:
    def look() -> list[RunSummary]:
        raise OSError(116, "Stale file handle")

    app = RunList(look, root="/far")
    async with app.run_test(size=(100, 10)) as pilot:
        await pilot.pause(0.1)
        assert "Stale file handle" in text(app._head(100)[0])


def test_status_of_a_newer_version_is_no_status(tmp_path: Path) -> None:
    run = FakeRun().begin().advance(5).write(tmp_path)
    status = msgspec.to_builtins(run.read_status())
    (run.path / "status.json").write_bytes(msgspec.json.encode(status | {"phase": "dreaming"}))
    assert summarize_run(run, alive).state == "new"


@pytest.mark.parametrize("moment", [0.0, -1.0, -1e308, math.inf, -math.inf, math.nan])
def test_what_is_no_moment_was_never(moment: float) -> None:
    assert format_last_sign(moment) == ""
