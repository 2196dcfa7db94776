"""The README is run: its shell lines, its Python block, its tables of keys and of exit codes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guardrail.core.errors import ExitCode
from guardrail.tui.screens.keys import keys_as_markdown
from tests.support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The same commands on a run of seconds instead of minutes.
SMALL = [
    "train.steps=6", "optim.warmup_steps=2", "model.layers=1", "model.width=32", "data.sequence_length=32",
    "train.eval_every=3", "checkpoint.every=3",
]  # fmt: skip
# The first of them starts two ranks, as it says; what the others show beyond it is on the screen
# and in the files.
LATER = ["launch.processes=1", "tensorboard.enabled=false"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#", 1)[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_line_runs(tmp_path: Path) -> None:
    """In the order of the README, in a folder that holds configs/ and a corpus as a clone does."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    environment["PYTHONPATH"] = str(ROOT)
    run = ""
    ran = []
    for line in commands():
        words = line.split()
        if words[0] == "make":
            # Running them here would run this test again; that the targets exist and expand is what
            # can be held.
            done = subprocess.run(
                ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            continue
        if words[0] == ".":
            continue  # the environment that this test runs in
        words = [run if word in ("RUN", "LOG") else word for word in words]
        if words[1] == "launch" and "--resume" not in words:
            words += [
                part for setting in SMALL + LATER * ("launch" in ran) for part in ("--set", setting)
            ]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=240,
        )
        ran.append(words[1])
        # gpu-8.toml asks for eight GPUs: doctor says that this machine has none, which is its
        # answer, not a failure.
        allowed = {0, 2} if "gpu-8" in line else {0}
        assert done.returncode in allowed, (
            f"{line}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        if words[1] == "launch" and "--resume" not in words:
            run = done.stdout.split()[0]
            assert (Path(run) / "config.toml").is_file()
    assert {"launch", "attach", "runs", "report", "verify", "doctor", "replay"} <= set(ran)


def test_the_loop_of_ones_own_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_keys_are_keys_of_the_screen() -> None:
    table = README.partition("| key | what it does |")[2].partition("\n\n")[0]
    named = re.findall(
        r"`([^`]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:])
    )
    assert len(named) > 10
    assert set(named) <= set(
        re.findall(r"^\| `([^`]+)` \|", keys_as_markdown(), flags=re.MULTILINE)
    )


def test_it_can_be_read_in_five_minutes() -> None:
    assert README.count("\n") <= 150


@pytest.mark.parametrize("code", list(ExitCode))
def test_every_exit_code_is_explained(code: ExitCode) -> None:
    assert f"| {code.value} | " in README


def test_the_picture_is_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), f"{picture} is missing"
