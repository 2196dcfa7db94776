"""Thresholds proposed from recorded runs."""

from __future__ import annotations

import math
import random
import re
import tomllib
from pathlib import Path

import pytest

from guardrail.backtest.importers.sources import find_sources
from guardrail.cli.main import main
from guardrail.core.config import load_guard_options
from guardrail.core.errors import DataError


@pytest.fixture
def outliers(tmp_path: Path) -> Path:
    """Fifteen hundred records with an outlier of about 9 sigma every 250, each gone with the next
    record.
    """
    draw = random.Random(0)
    rows = ["step,loss,grad_norm"]
    for step in range(1, 1501):
        loss = 3.0 * math.exp(draw.gauss(0.0, 0.02) + (0.22 if step % 250 == 0 else 0.0))
        rows.append(f"{step},{loss},{0.5 * math.exp(draw.gauss(0.0, 0.1))}")
    path = tmp_path / "log.csv"
    path.write_text("\n".join(rows))
    return path


def proposal(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[dict[str, float], list[str]]:
    assert main(["tune", *arguments]) == 0
    output = capsys.readouterr().out
    return tomllib.loads(output)["guard"]["detectors"]["spike"], output.splitlines()


def test_a_run_with_outliers_is_left_in_peace(
    outliers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(outliers.parent.rglob("*"))
    guard, lines = proposal(capsys, str(outliers))
    assert set(guard) == {"loss_threshold", "grad_threshold"}, "no embedding norm was recorded"
    assert guard["loss_threshold"] >= 10.0
    assert guard["grad_threshold"] < 10.0, "nothing speaks against being more watchful there"
    table = lines[: lines.index(f"loss_threshold = {guard['loss_threshold']}")]
    rows = {
        float(line.split()[1]): int(line.split()[2])
        for line in table
        if re.match(r"#\s+[\d.]+\s", line)
    }
    assert rows[5.0] > 0 and rows[guard["loss_threshold"]] == 0
    assert rows == dict(sorted(rows.items())), "a table by threshold"
    assert any(line.endswith("default") for line in lines) and any(
        line.endswith("proposed") for line in lines
    )
    assert sorted(outliers.parent.rglob("*")) == before, "nothing is written"


def test_a_budget_that_allows_them(outliers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard, _ = proposal(capsys, str(outliers), "--budget", "100")
    assert guard["loss_threshold"] == 5.0


@pytest.mark.parametrize(("budget", "count"), [("0", 1), ("100", 0)])
def test_a_budget_that_no_value_keeps_is_remarked(
    outliers: Path, budget: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = outliers.read_text().splitlines()
    for row in range(300, 1500, 300):
        step, loss, norm = text[row].split(",")
        text[row] = f"{step},{float(loss) * 9},{norm}"
    outliers.write_text("\n".join(text))
    guard, lines = proposal(capsys, str(outliers), "--budget", budget)
    assert len([line for line in lines if "No value" in line]) == count
    if count:
        assert guard["loss_threshold"] == 20.0


def test_a_log_without_a_judged_signal_says_why_nothing_is_proposed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,mfu\n" + "".join(f"{step},0.4\n" for step in range(1, 9)))
    assert main(["tune", str(path), "--column", "mfu=mfu", "--budget", "0"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("#") and "loss" in last and "grad_norm" in last


def test_the_proposal_is_a_policy(
    outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard, lines = proposal(capsys, str(outliers), "--set", "guard.rollback_after_rejections=4")
    file = tmp_path / "policy.toml"
    file.write_text("\n".join(lines))
    assert load_guard_options(file).detectors.spike.loss_threshold == guard["loss_threshold"]
    assert main(["backtest", str(outliers), "--policy", str(file)]) == 0


def test_nothing_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(tmp_path)]) == 2
    output, errors = capsys.readouterr()
    (source,) = find_sources([str(tmp_path)])
    with pytest.raises(DataError) as caught:
        source.read({})
    assert output == "" and errors.splitlines()[0] == f"guardrail: {caught.value}"
