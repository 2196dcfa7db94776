"""`guardrail view`: the screen over a recorded log says what `backtest` says, and writes
nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from guardrail.backtest import backtest
from guardrail.backtest import recorded_run as viewing
from guardrail.cli.main import main
from guardrail.core.config import load_guard_options
from guardrail.core.errors import DataError
from guardrail.core.records.commands import Command
from guardrail.tui.app.app import GuardrailApp
from guardrail.tui.model.recorded_reader import REFUSAL, RecordedReader
from guardrail.tui.model.view import Snapshot, View
from tests.support.fake_run import example


def write(
    path: Path, losses: list[str], *, steps: list[int] | None = None, norms: list[str] | None = None
) -> Path:
    numbers = steps or range(1, len(losses) + 1)
    rows = [f"{numbers[at]},{loss},{norms[at] if norms else ''}" for at, loss in enumerate(losses)]
    path.write_text("step,loss,grad_norm\n" + "\n".join(rows) + "\n")
    return path


def healthy(count: int) -> list[str]:
    draw = random.Random(0)
    return [f"{2 + 9 * math.exp(-at / 40) + draw.gauss(0, 0.02):.4f}" for at in range(count)]


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six bad rows from step 501 on, one NaN at 801; the norm is logged in every tenth row."""
    losses = healthy(6000)
    losses[500:506] = ["9.0", "11.0", "12.0", "9.0", "8.0", "7.0"]
    losses[800] = "nan"
    norms = ["0.5" if at % 10 == 0 else "" for at in range(6000)]
    return write(tmp_path_factory.mktemp("logs") / "spiked.csv", losses, norms=norms)


def read(path: Path, *overrides: str) -> Snapshot:
    reader = RecordedReader(
        viewing.RecordedRun(
            viewing.read_one_log(str(path), {}), load_guard_options(overrides=overrides)
        )
    )
    said: list[str] = []
    reader.start(lambda: said.append(reader.latest().recorded))
    reader.join()
    assert said
    reader.send(Command(id="x", kind="stop"))
    assert reader.latest().unsent == {"x": REFUSAL}
    return reader.latest()


def test_it_shows_the_incidents_that_backtest_reports(spiked: Path) -> None:
    found = read(spiked)
    (log,) = [viewing.read_one_log(str(spiked), {})]
    cases = backtest.run_backtest(log, load_guard_options()).incidents
    expected = [
        (case.first.incident, min(case.first.onset_step, case.first.step)) for case in cases
    ]
    assert [(one.number, one.step) for one in reversed(found.story.incidents)] == expected and len(
        expected
    ) == 2
    assert all(not one.open and one.action.startswith("would ") for one in found.story.incidents)
    assert found.story.marks["#"] == ((501, "1"), (801, "2")), (
        "where each would have been acted on first"
    )
    assert "6,000 rows (csv)" in found.recorded and "% done" not in found.recorded
    assert View(found, 0.0).health.word == "RECORDED"


def test_curves_have_bands_and_what_was_not_logged_is_no_nan(spiked: Path) -> None:
    series = read(spiked).series
    assert len(series) == 6000 and np.flatnonzero(series.bad["loss"]).tolist() == [800]
    assert np.isfinite(series.values["loss_threshold"][100:]).all()
    assert (
        not series.bad["grad_norm"].any() and np.isfinite(series.values["grad_norm"]).sum() == 600
    )


def test_rows_that_start_anew_abandon_steps(tmp_path: Path) -> None:
    """A log that a resume goes on with some steps back: what it ran again is the present."""
    losses = healthy(300)
    path = write(
        tmp_path / "resumed.csv",
        [*losses[:200], *losses[150:]],
        steps=[*range(1, 201), *range(151, 301)],
    )
    series = read(path).series
    assert series.step.tolist() == list(range(1, 301)) and [
        len(one) for one in series.abandoned
    ] == [50]


def test_settings_decide(spiked: Path) -> None:
    assert not read(spiked, "guard.mode=off").story.incidents


def test_a_run_directory_under_other_settings(tmp_path: Path) -> None:
    run = example().write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert (
        viewing.is_run_directory(str(run.path))
        and not viewing.is_run_directory(str(tmp_path))
        and not viewing.is_run_directory("/nowhere")
    )
    found = read(
        run.path, "guard.loss_score=1000", "guard.grad_score=1000", "guard.embed_score=1000"
    )
    assert found.series.last_step == 1284 and len(found.series.abandoned) == 1
    assert 1207 not in {one.step for one in found.story.incidents}
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before, (
        "nothing is written"
    )


def test_several_runs_and_none(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        viewing.read_one_log(str(tmp_path), {})
    assert caught.value.kind == "no_run"
    for name in ("a", "b"):
        write(tmp_path / f"{name}.csv", healthy(20))
    with pytest.raises(DataError, match=r"\n  hint: .*a\.csv, .*b\.csv") as caught:
        viewing.read_one_log(str(tmp_path), {})
    assert caught.value.kind == "several_runs"


def test_without_a_terminal_it_names_backtest(
    spiked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", str(spiked)]) == 2
    assert f"guardrail backtest {spiked}" in capsys.readouterr().err


def test_another_process_judges_the_same(spiked: Path, tmp_path: Path) -> None:
    log = viewing.read_one_log(str(spiked), {})
    here = viewing.RecordedRun(log, load_guard_options())
    there = viewing.Background(viewing.RecordedRun(log, load_guard_options()))
    try:
        assert len(there) == len(here) and there.columns == here.columns
        for mine, other in zip(here.judged_parts(), there.judged_parts(), strict=True):
            assert np.array_equal(mine.rows, other.rows, equal_nan=True)
            assert repr(mine.events) == repr(other.events)
    finally:
        there.close()
    assert not there._process.is_alive()


def test_a_judge_that_fails_says_why(spiked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: viewing.RecordedRun) -> Iterator[viewing.Part]:
        raise ValueError("E17")
        yield

    monkeypatch.setattr(viewing.RecordedRun, "judged_parts", fails)
    there = viewing.Background(
        viewing.RecordedRun(viewing.read_one_log(str(spiked), {}), load_guard_options())
    )
    reader = RecordedReader(there)
    reader.start(lambda: None)
    reader.join()
    there.close()
    assert reader.latest().problem.endswith(": ValueError: E17")
    assert len(reader.latest().series) == 6000


async def test_the_screen_over_a_log(spiked: Path) -> None:
    reader = RecordedReader(
        viewing.RecordedRun(viewing.read_one_log(str(spiked), {}), load_guard_options())
    )
    app = GuardrailApp(reader, read_only=True)
    async with app.run_test(size=(120, 32)) as pilot:
        reader.join()
        await pilot.pause(0.3)
        shown = app.export_screenshot()
        assert "RECORDED" in shown and "would" in shown
        await pilot.press("q")
    assert app.return_code == 0
