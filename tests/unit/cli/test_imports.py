"""Which heavy modules a fresh interpreter leaves unloaded, so that the command line answers at
once.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from guardrail.cli.main import COMMANDS

HEAVY = (
    "torch",
    "accelerate",
    "textual",
    "numpy",
    "tensorboard",
    "tokenizers",
    "safetensors",
    "rich",
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nprint('\\n' + ' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_after(f"from guardrail.cli.main import main\nassert main({arguments!r}) == 0")
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY), loaded & set(HEAVY)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("guardrail.launch.supervisor", set()),  # it lives as long as the run
        ("guardrail.launch.launcher", set()),
        ("guardrail.rundir.stop_signals", set()),
        ("guardrail.launch.log_printer", set()),
        ("guardrail.operate.control", set()),
        ("guardrail.launch.doctor", set()),
        ("guardrail.rundir.heartbeat", set()),  # a rank is heard before it has imported torch
        ("trainer.config.config", set()),  # `launch` refuses a bad file without torch
        ("guardrail.decide.controller", {"numpy"}),  # the pure core
        ("guardrail.tui.app.app", {"numpy", "textual", "rich"}),
    ],
)
def test_a_room_loads_only_what_it_may(module: str, allowed: set[str]) -> None:
    heavy = loaded_after(f"import {module}") & set(HEAVY)
    assert heavy <= allowed, heavy - allowed
