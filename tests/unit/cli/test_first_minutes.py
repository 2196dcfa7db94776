"""What a user types first: `guardrail`, `guardrail init`, a command with a typo, completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

from guardrail.cli import init
from guardrail.cli.main import COMMANDS, COMPLETION_VARIABLE, main
from guardrail.core.config import build_config
from guardrail.core.records.status import Phase, Status
from guardrail.core.toml_file import read_toml
from guardrail.rundir.run_directory import RunDirectory
from trainer.config import Config


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUARDRAIL_ROOT", raising=False)
    monkeypatch.setattr("guardrail.launch.preflight.count_cuda_devices", lambda: 0)


def read(path: str = "config.toml") -> Config:
    config = build_config(read_toml(Path(path)), file=path, base=Path.cwd())
    assert isinstance(config, Config)
    return config


def first_words(output: str) -> list[str]:
    """The second word of each line that names a command of guardrail."""
    return [line.split()[1] for line in output.splitlines() if line.startswith("guardrail ")]


def test_without_a_terminal_init_takes_its_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    config = read()
    assert config.data.sources == (init.BUILT_IN_TEXT,)
    assert (config.launch.processes, config.train.steps) == (1, 300)
    assert "config.toml" in capfd.readouterr().out


@pytest.mark.parametrize("size", init.SIZES)
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_every_size_on_any_number_of_processes_is_a_valid_configuration(
    size: str, processes: int
) -> None:
    assert main(["init", "a.toml", "--size", size, "--processes", str(processes)]) == 0
    config = read("a.toml")
    assert config.launch.processes == processes
    assert config.train.batch_size >= init.SIZES[size].batch_size
    assert config.micro_batches >= 1
    assert config.run.name == "a"


def test_init_takes_awkward_names_of_files(tmp_path: Path) -> None:
    folder = tmp_path / 'my "text"'
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    assert main(["init", "--data", str(folder), "--data", "builtin:python"]) == 0
    assert read().data.sources == (str(folder), "builtin:python")


def test_init_writes_nothing_that_cannot_work(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--data", "nowhere"]) == 2
    assert not Path("config.toml").exists()
    assert "nowhere" in capfd.readouterr().err


def test_init_replaces_a_file_only_with_force(capfd: pytest.CaptureFixture[str]) -> None:
    Path("config.toml").write_text("mine")
    assert main(["init"]) == 2
    assert Path("config.toml").read_text() == "mine"
    assert "--force" in capfd.readouterr().err
    assert main(["init", "--force"]) == 0
    assert read().train.steps == 300


def test_init_prints_to_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "-"]) == 0
    assert "[train]" in capfd.readouterr().out
    assert not Path("config.toml").exists()


def test_init_asks_three_questions_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "has_terminal", lambda: True)
    done = click.testing.CliRunner().invoke(init.command, input="builtin:python\nsmall\n2\n")
    assert done.exit_code == 0, done.output
    config = read()
    assert (config.model.layers, config.launch.processes) == (init.SIZES["small"].layers, 2)


def test_alone_it_says_what_one_can_do_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert first_words(capfd.readouterr().out) == ["init", "backtest", "--help"]
    Path("config.toml").write_text("")
    run = RunDirectory.create(tmp_path / "runs", "gpt", "")
    assert main([]) == 0
    assert first_words(capfd.readouterr().out)[:4] == ["attach", "runs", "launch", "doctor"]
    run.write_status(Status(run=run.name, phase=Phase.FINISHED))
    assert main([]) == 0
    output = capfd.readouterr().out
    assert first_words(output)[0] == "report"
    assert run.name in output


@pytest.mark.parametrize(
    ("typed", "meant"), [("lanch", "launch"), ("atach", "attach"), ("reports", "report")]
)
def test_a_typo_names_the_command_that_was_meant(
    typed: str, meant: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    (hint,) = (line for line in capfd.readouterr().err.splitlines() if "hint:" in line)
    assert re.findall(r"\w+", hint)[-1] == meant


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert COMPLETION_VARIABLE in capfd.readouterr().out


def test_completion_without_a_shell_lists_the_shells(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 2
    assert capfd.readouterr().err.endswith(" bash, zsh, fish\n")


def complete(words: str, position: int) -> list[str]:
    """What the shell is offered for the word at `position`."""
    done = subprocess.run(
        [sys.executable, "-m", "guardrail"],
        env={
            **os.environ,
            COMPLETION_VARIABLE: "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_and_runs(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "gpt", "")
    assert complete("guardrail la", 1) == ["launch"]
    assert set(complete("guardrail ", 1)) == set(COMMANDS)
    words = ["guardrail", "report", "gp"]
    assert complete(" ".join(words), 2) == [run.name]
