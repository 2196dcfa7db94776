"""What the options of `guardrail report` print, and which do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardrail.cli.main import main
from guardrail.rundir.run_directory import RunDirectory
from tests.unit.report.test_limits import make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path, 2)


def said(capsys: pytest.CaptureFixture[str], run: RunDirectory, *options: str) -> str:
    capsys.readouterr()
    assert main(["report", str(run.path), *options]) == 0
    return capsys.readouterr().out


def test_each_option_prints_its_part(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, run).startswith(f"{run.name}: halted")
    assert "Signals" in said(capsys, run, "--incident", "2")
    assert "Commands" in said(capsys, run, "--commands")
    assert len(said(capsys, run, "--quarantine").splitlines()) == 32
    assert len(said(capsys, run, "--chart").splitlines()) >= len(said(capsys, run).splitlines())


@pytest.mark.parametrize("number", ["0", "3", "-1"])
def test_an_unknown_incident_is_one_sentence(
    run: RunDirectory, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path), "--incident", number]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert f"--incident {number}" in captured.err and "1 to 2" in captured.err


@pytest.mark.parametrize(
    "options",
    [
        ("--json", "--quarantine"),
        ("--json", "--incident", "1"),
        ("--json", "--commands"),
        ("--json", "--chart"),
        ("--json", "--format", "html"),
        ("--quarantine", "--format", "markdown"),
        ("--quarantine", "--commands"),
        ("--incident", "1", "--quarantine"),
        ("--incident", "1", "--commands"),
        ("--incident", "1", "--chart"),
        ("--incident", "1", "--format", "html"),
        ("--commands", "--chart"),
        ("--excerpts",),
        ("--excerpts", "--commands"),
        ("--chart", "--format", "html"),
        ("--chart", "-o", "page.html"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_refused(
    run: RunDirectory, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run.path), *options]) == 2
    assert capsys.readouterr().out == "" and not Path("page.html").exists()


def test_an_incident_is_written_to_a_file(run: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    assert main(["report", str(run.path), "--incident", "1", "-o", str(file)]) == 0
    assert "Signals" in file.read_text(encoding="utf-8")


def test_the_commands_of_the_summary_name_the_run_so_that_it_is_found(
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUARDRAIL_ROOT", raising=False)
    assert f"report {run.name} --incident" in named(capsys, "--root", ".")
    monkeypatch.setenv("GUARDRAIL_ROOT", ".")
    assert f"report {run.name} --incident" in named(capsys)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("GUARDRAIL_ROOT")
    path = f"../{run.name}"
    assert f"report {path} --incident" in named(capsys, path)


def named(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["report", *words]) == 0
    return capsys.readouterr().out
