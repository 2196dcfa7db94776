"""Each guardrail command of the pages in docs/ is run, on runs of seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_docs import command_lines
from tests.e2e.test_readme import LATER, SMALL, commands
from tests.support.places import ROOT

# Exit code 2 is the answer of `doctor` where a configuration cannot run on this machine.
REFUSED = ("doctor configs/gpu-8.toml", "doctor --dry-run")
# These pages run their own commands.
ELSEWHERE = ("backtest.md", "integrations.md")
# Run first: the other commands read its run directory.
FIRST = "guardrail launch configs/quickstart.toml --headless"


def lines_to_run() -> list[str]:
    """Return the distinct commands of the pages that the README does not have."""
    found = dict.fromkeys([*commands(), FIRST])
    lines = []
    for page, line in command_lines():
        plain = " ".join(line.split("#", 1)[0].split())
        if plain not in found and page not in ELSEWHERE:
            found[plain] = None
            lines.append(plain)
    return lines


class Folder:
    """A folder with configs/, as a clone has it.

    Attributes:
        run: the run directory of the first launch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ""
        shutil.copytree(ROOT / "configs", path / "configs")
        scripts = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(path / "cache"),
        }

    def execute(self, line: str) -> subprocess.CompletedProcess[str]:
        words = [self.run if word in ("RUN", "LOG") else word for word in line.split()]
        if words[1] == "launch" and "--resume" not in words:
            for setting in SMALL + LATER:
                words += ["--set", setting]
        return subprocess.run(
            words,
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=240,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    made = Folder(tmp_path_factory.mktemp("docs"))
    done = made.execute(FIRST)
    assert done.returncode == 0, done.stderr
    made.run = done.stdout.split()[0]
    assert made.execute("guardrail init").returncode == 0
    yield made
    made.execute("guardrail attach")  # returns when the newest run, which is detached, has ended


@pytest.mark.parametrize("line", lines_to_run())
def test_a_command_of_the_pages_runs(folder: Folder, line: str) -> None:
    if line == "guardrail init":
        (folder.path / "config.toml").unlink()
    done = folder.execute(line)
    allowed = {0, 2} if any(part in line for part in REFUSED) else {0}
    assert done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
