"""docs/backtest.md and docs/integrations.md: each shell line and each Python block is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pexpect
import pytest

from guardrail.cli.backtest import command as backtest_command
from guardrail.cli.main import main
from guardrail.rundir.run_directory import RunDirectory
from tests.e2e.test_docs import blocks_of
from tests.support.places import ROOT, TESTS
from tests.support.ranks import run_ranks

BACKTEST = ROOT / "docs" / "backtest.md"
INTEGRATIONS = ROOT / "docs" / "integrations.md"
LOG = str(TESTS / "cases" / "tiny_runs.csv")
RL_LOG = str(TESTS / "cases" / "rl" / "c03b_kl.jsonl")  # has a column "kl"

# After the block with all hooks: each hook is called as the guard calls it.
CALL_EACH_HOOK = """
assert guard.phase.value == "finished" and guard.step == 50, (guard.phase, guard.step)
batch, rows = step.batch, []
loss, tokens, nominal = hooks.replay(batch, 50, rows)
((positions, sums, counts),) = rows
assert len(positions) == len(sums) == len(counts) == 8
assert abs(float(sums.sum() / counts.sum()) - float(loss)) < 1e-3
as_is, shuffled, number = hooks.label_order_gain(batch, 50)
assert shuffled > 0 and number == 8 * 16
hooks.rerun_forward()
documents, total = hooks.describe_samples([3, 5])
assert len(documents) == total == 2 and len(hooks.sample_texts([3, 5])) == 2
assert hooks.describe_tokens([65], [3])[0].keys() == {"text", "count"}
assert hooks.scheduled_lr(1) == 1e-3 and hooks.fingerprints
"""


def shell_lines(path: Path) -> list[str]:
    return [line for block in blocks_of(path, "sh") for line in block.splitlines() if line.strip()]


def run_python(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", shell_lines(BACKTEST))
def test_each_shell_line_of_the_backtest_page(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line, comments=True)
    assert name == "guardrail"
    assert main([LOG if word == "LOG" else word for word in arguments]) == 0
    output = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(output)["summary"]["logs"] == 1
    elif arguments[0] == "tune":
        assert "spike" in tomllib.loads(output)["guard"]["detectors"]
    else:
        assert LOG in output and "1 log, 3,600 records" in output
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_options_of_the_backtest_page_exist() -> None:
    known = {name for parameter in backtest_command.params for name in parameter.opts}
    text = BACKTEST.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(--[a-z]+)", text, flags=re.MULTILINE))
    assert named == {"--labels", "--plot", "--svg", "--json"}
    assert named <= known


@pytest.mark.parametrize("option", ["--column kl=kl", "--set guard.extra_signals='[\"kl\"]'"])
def test_a_further_signal_of_the_backtest_page(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"`{option}`" in BACKTEST.read_text(encoding="utf-8")
    assert main(["backtest", RL_LOG, "--json", *shlex.split(option)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["columns"]["kl"] == "kl" and "kl" not in run["recorded_only"]


def test_the_toml_of_the_backtest_page_judges_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks_of(BACKTEST, "toml")
    config = tmp_path / "guard.toml"
    config.write_text(block)
    assert main(["backtest", RL_LOG, "--json", "--config", str(config)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["loss"] == "signed" and "kl" in run["columns"]


def test_view_prints_lines_in_a_terminal_that_cannot_draw() -> None:
    output, code = pexpect.run(
        f"{sys.executable} -m guardrail view {LOG}",
        env={**os.environ, "TERM": "dumb", "PYTHONPATH": str(ROOT)},
        cwd=str(ROOT),
        encoding="utf-8",
        withexitstatus=True,
        timeout=120,
    )
    assert code == 0, output
    assert "incident 1" in output


def test_the_shortest_loop_of_the_integrations_page_runs(tmp_path: Path) -> None:
    shortest, _, _ = blocks_of(INTEGRATIONS, "python")
    run_python(shortest + "\nassert guard.step == 50\n", tmp_path)


def run_block(rank: int, code: str, folder: str) -> tuple[str, int]:
    """Run a Python block of a page as one rank of torchrun; return its run directory and step."""
    os.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return str(names["run"].path), names["guard"].step


def test_the_loop_with_several_ranks_of_the_integrations_page_runs(tmp_path: Path) -> None:
    _, several_ranks, _ = blocks_of(INTEGRATIONS, "python")
    found = run_ranks(run_block, 2, several_ranks, str(tmp_path), init=False, folder=tmp_path)
    (path,) = (tmp_path / "runs" / "own").iterdir()
    assert found == [(str(path), 20), (str(path), 20)]
    (events,) = [RunDirectory.open(path).events()]
    assert events[0].data["world"] == 2 and events[-1].kind == "ended"
    assert not [event for event in events if event.kind == "note"]


def test_the_loop_with_all_hooks_of_the_integrations_page_runs(tmp_path: Path) -> None:
    _, _, with_hooks = blocks_of(INTEGRATIONS, "python")
    run_python(with_hooks + CALL_EACH_HOOK, tmp_path)


def test_the_integrations_page_describes_every_hook() -> None:
    from guardrail import LoopHooks

    text = INTEGRATIONS.read_text(encoding="utf-8").partition("## LoopHooks")[2]
    table = text.partition("```")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(
        LoopHooks.__dataclass_fields__
    )
