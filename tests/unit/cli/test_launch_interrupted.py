"""Ctrl-C directly after `guardrail launch`: the run has started, so its user learns of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guardrail.cli.main import main
from guardrail.launch import launcher, log_printer, supervisor_process
from guardrail.launch.launcher import Prepared
from guardrail.rundir.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "gpt", "")
    monkeypatch.setattr(launcher, "prepare_run", lambda *_, **__: Prepared(made, 0, {}))
    return made


def assert_told(run: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "config.toml", "--headless"]) == 130
    output, errors = capfd.readouterr()
    assert output == f"{run.path}\n"
    assert f"guardrail attach {run.path}" in errors and f"guardrail ctl {run.path} stop" in errors


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_while_the_supervisor_starts(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = SimpleNamespace(poll=lambda: None, stdin=None, pid=1, returncode=None)
    monkeypatch.setattr(supervisor_process.subprocess, "Popen", lambda *_, **__: process)
    monkeypatch.setattr(supervisor_process.time, "sleep", interrupt)
    assert_told(run, capfd)


def test_before_the_first_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(supervisor_process, "start_supervisor", lambda *_: process)
    monkeypatch.setattr(log_printer, "follow_run", interrupt)
    assert_told(run, capfd)
