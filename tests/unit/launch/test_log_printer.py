"""A run as lines: each says when it was, and how fast the run was then."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import msgspec
import pytest

from guardrail.core.records.status import Phase
from guardrail.launch.log_printer import LogLines
from guardrail.rundir.run_directory import RunDirectory
from tests.support.fake_run import START, FakeRun, example


@pytest.mark.fault("T19")
def test_each_line_has_its_time_and_the_speed_of_its_row(tmp_path: Path) -> None:
    run = example().write(tmp_path)
    status = run.read_status()
    assert status is not None
    run.write_status(msgspec.structs.replace(status, tokens_per_second=5.0, eta_seconds=7.0))
    lines = LogLines(run).read_new_lines()
    assert len(lines) > 60
    for line in lines:
        assert re.match(r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d ", line), line
    step = next(line for line in lines if " 600/6000 " in line)
    assert "34,133 tok/s" in step, "as the rows have it, and not as the run is now"
    assert "ETA 0:10:48" in step, "5,400 steps of 0.12 s"
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(START)) in lines[0]


def test_a_row_of_an_older_version_has_fewer_columns(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "old", "")
    (run.path / "metrics.json").write_bytes(
        msgspec.json.encode({"columns": ["step", "verdict", "loss"]})
    )
    with run.metrics_writer() as rows:
        rows.append({"step": 20, "verdict": 0, "loss": 2.5})
    (line,) = LogLines(run).read_new_lines()
    assert "loss 2.5000" in line and "nan" in line and line.startswith("--:--:-- ")


def test_a_set_up_that_gets_ahead_has_a_time(tmp_path: Path) -> None:
    run = FakeRun().write(tmp_path)
    status = run.read_status()
    assert status is not None
    run.write_status(msgspec.structs.replace(status, phase=Phase.SETUP, progress="tokenizing 43 %"))
    (line,) = LogLines(run).read_new_lines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d setup: tokenizing 43 %", line)


def test_rows_of_a_damaged_file_are_short_lines_or_none(tmp_path: Path) -> None:
    run = FakeRun().begin().advance(20).write(tmp_path)
    with run.metrics_writer() as rows:
        for step in (1e300, math.inf, math.nan):
            rows.append({"step": step, "timeline": 0, "verdict": 0, "eval_loss": 1.0})
        rows.append({"step": 40, "timeline": math.inf, "verdict": 0, "loss": 1.0})
        rows.append(
            {
                "step": 60,
                "timeline": 0,
                "verdict": 0,
                "loss": 1e300,
                "step_time": math.inf,
                "tokens": 1e308,
            }
        )
    lines = [line for line in LogLines(run).read_new_lines() if " step " in line]
    assert [re.search(r"step +(\d+)", line)[1] for line in lines] == ["20", "60"]  # type: ignore[index]
    assert "loss 1e+300" in lines[-1] and max(map(len, lines)) < 160
