"""The run directory of a custom loop: created by hand, then read by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from guardrail.cli.main import main
from guardrail.core.config import GuardConfig, is_custom_loop, load_guard_options
from guardrail.core.errors import RunDirectoryError, UsageError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Mode
from guardrail.core.toml_file import dump_toml
from guardrail.decide.sample_order import SampleOrder
from guardrail.launch.launcher import prepare_resume
from guardrail.report.build import build_report
from guardrail.report.summary import list_next_commands
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.guard import Guard
from tests.unit.core.wrong_settings import STEPS
from trainer.config.config import Config

SEQUENCE = 16


def train(run: RunDirectory, *, upto: int = 0, **finish: Any) -> None:
    """Train 20 steps, or stop after step `upto`."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    guard = Guard(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        data=SampleOrder(80),
        batch_size=4,
        total_steps=20,
        run=run,
    )
    for step in guard:
        loss = model(torch.ones(4, 2)).square().mean()
        loss.backward()
        step.finish(loss, **finish)
        if step.number == upto:
            guard.end(Phase.STOPPED, "stopped by the test")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


# -- RunDirectory.create


def test_a_run_directory_can_store_a_guard_config(tmp_path: Path) -> None:
    config = GuardConfig(guard=GuardOptions(mode=Mode.ADVISE))
    run = RunDirectory.create(tmp_path, "own", config)
    assert run.config_text() == dump_toml(config)
    assert load_guard_options(run.path / "config.toml", of_run=True).mode is Mode.ADVISE
    assert RunDirectory.create(tmp_path, "own").config_text() == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"config_toml": {"guard": {}}}, ("config_toml", "dict")),
        ({"config_toml": None}, ("config_toml", "NoneType")),
        ({"name": 3}, ("name", "int")),
        ({"root": GuardConfig()}, ("root", "GuardConfig")),
    ],
)
def test_a_wrong_type_is_refused(
    tmp_path: Path, arguments: dict[str, Any], named: tuple[str, str]
) -> None:
    given: dict[str, Any] = {"root": tmp_path / "runs", "name": "own", **arguments}
    with pytest.raises(UsageError) as caught:
        RunDirectory.create(**given)
    assert caught.value.kind == "wrong_type"
    assert all(word in str(caught.value) for word in named)
    assert not (tmp_path / "runs").exists()


def test_is_custom_loop_knows_what_a_launcher_writes(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    texts = {
        "": True,
        dump_toml(GuardConfig()): True,
        "[guard]\nmode = 'ask'\n": True,
        "[launch]\ntrainer = 'my_trainer'\n": False,
        STEPS: False,
        dump_toml(Config()): False,
        "not TOML": False,
    }
    for text, expected in texts.items():
        file.write_text(text)
        assert is_custom_loop(file) is expected, text
    assert not is_custom_loop(tmp_path / "missing")


# -- the commands


@pytest.mark.parametrize("config", ["", GuardConfig()])
def test_the_report_names_how_a_custom_loop_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any
) -> None:
    run = RunDirectory.create(tmp_path, "own", config)
    train(run, upto=6)
    report = build_report(run)
    assert report.custom_loop
    commands = [command for command, _ in list_next_commands(report, "own")]
    assert commands[0].startswith("run=RunDirectory.open(")
    assert "--resume" not in printed(capsys, "report", str(run.path))
    with pytest.raises(RunDirectoryError) as caught:
        prepare_resume(str(run.path), (), root=str(tmp_path))
    assert caught.value.kind == "custom_loop" and str(run.path) in str(caught.value)


def test_the_report_omits_tokens_that_the_loop_has_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uncounted = RunDirectory.create(tmp_path, "own")
    train(uncounted)
    text = printed(capsys, "report", str(uncounted.path))
    assert "finished, 20 of 20 steps" in text and "tokens" not in text
    assert build_report(uncounted).tokens == 0
    counted = RunDirectory.create(tmp_path, "own")
    train(counted, tokens=4 * SEQUENCE)
    assert "1,280 tokens" in printed(capsys, "report", str(counted.path))


def test_backtest_judges_a_run_without_a_configuration_with_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path, "own")
    train(run)
    assert "1 log, 20 records" in printed(capsys, "backtest", str(run.path))
