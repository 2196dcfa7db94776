"""doctor: every line is there, and what cannot run here is said so."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guardrail.cli.main import main
from guardrail.launch import doctor
from guardrail.launch.doctor import Report
from guardrail.launch.machine_checks import Check
from tests.support.golden import assert_golden
from tests.support.places import ROOT

CPU = {"cuda_built": "", "devices": [], "bf16": False, "gloo": True, "nccl": False}
GPU = {
    "cuda_built": "12.8",
    "devices": [{"name": "H100\x1b[31m", "bytes": 80 << 30}] * 2,
    "bf16": False,
    "gloo": True,
    "nccl": True,
}
GOOD = "[train]\nsteps = 100\n[optim]\nwarmup_steps = 10\n[launch]\nprocesses = 2\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture(autouse=True)
def _no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardrail.launch.preflight.count_cuda_devices", lambda: 0)


def with_torch(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr("guardrail.launch.doctor.ask_torch", lambda: answer)


def named(checks: tuple[Check, ...], name: str) -> list[Check]:
    return [check for check in checks if check.name == name]


def test_the_real_machine_as_json() -> None:
    """The one test that asks the real torch, in the real subprocess."""
    result = subprocess.run(
        [sys.executable, "-m", "guardrail", "doctor", "--json"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0
    report = json.loads(result.stdout)
    said = {check["name"]: check for check in report["machine"]}
    for name in (
        "python",
        "torch",
        "accelerate",
        "cores",
        "memory",
        "cuda",
        "gloo",
        "nccl",
        "disk",
        "py-spy",
        "terminal",
    ):
        assert said[name]["text"]
    assert said["gloo"]["level"] == "ok"
    assert said["terminal"]["text"].startswith("none")
    assert report["configuration"] is None


def test_a_configuration_that_can_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_torch(monkeypatch, CPU)
    assert main(["doctor", str(config)]) == 0
    assert ", 2 processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "torch", "said"),
    [
        ("launch.device=cuda", CPU, "launch.device = 'cuda': "),
        ("train.stepz=1", CPU, "train.steps?"),
        ("launch.processes=1", {"error": "No module named 'torch'"}, "torch"),
        ("launch.processes=2", {**CPU, "gloo": False}, "gloo"),
        ("train.precision=bf16", GPU, 'train.precision = "bf16": '),
    ],
)
def test_a_configuration_that_cannot_run_ends_with_2(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    torch: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_torch(monkeypatch, torch)
    assert main(["doctor", str(config), "--set", override]) == 2
    output = capsys.readouterr().out
    assert said in output and "problem" in output


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["here", "elsewhere"])
def test_a_run_name_that_launch_refuses_is_a_problem(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_torch(monkeypatch, CPU)
    name = ["--set", "run.name=../../evil"]
    assert main(["doctor", str(config), *name, *options, "--json"]) == 2
    checks = json.loads(capsys.readouterr().out)["configuration"]
    problems = [check["text"] for check in checks if check["level"] == "problem"]
    assert any(text.startswith("--set: run.name = '../../evil': ") for text in problems)
    assert not [
        one for one in checks if (one["name"], one["level"]) == (doctor.CONFIGURATION, "ok")
    ]
    assert main(["launch", str(config), *name]) == 2
    assert "run.name = '../../evil': " in capsys.readouterr().err


def test_more_processes_than_cores_is_a_note(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch(monkeypatch, CPU)
    monkeypatch.setattr("guardrail.rundir.processes.cores", lambda: 1)
    report = doctor.check_machine(str(config))
    assert [check.level for check in report.configuration or ()] == ["note", "ok"]
    assert doctor.find_exit_code(report) == 0


def test_a_device_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch(monkeypatch, CPU)
    monkeypatch.setattr("guardrail.launch.preflight.count_cuda_devices", lambda: 8)
    (cuda,) = named(doctor.check_machine().machine, "cuda")
    assert cuda.level == "problem" and "8 device files" in cuda.text


def test_devices_are_listed_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch(monkeypatch, GPU)
    (cuda,) = named(doctor.check_machine().machine, "cuda")
    assert cuda.text == "2: H100 80.0 GiB, H100 80.0 GiB"


def test_a_torch_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "guardrail.launch.torch_probe._SCRIPT", "raise OSError('libcudart.so: cannot open')"
    )
    (line,) = named(doctor.check_machine().machine, "torch import")
    assert line.level == "problem" and line.text == "OSError: libcudart.so: cannot open"


def test_a_slow_import_is_talked_about(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "guardrail.launch.torch_probe._SCRIPT",
        'import time; time.sleep(0.5); print(\'{"error": "x"}\')',
    )
    monkeypatch.setattr("guardrail.launch.torch_probe.PATIENCE_SECONDS", 0.1)
    doctor.check_machine()
    assert "importing torch" in capfd.readouterr().err


def test_lines_carry_a_word_beside_the_glyph() -> None:
    report = Report(machine=(Check(name="disk", level="problem", text="full"),))
    assert list(doctor.format_lines(report)) == ["disk  ✗ problem: full"]


BLOOM = ROOT / "configs" / "bloom-3d.toml"


def test_a_dry_run_says_what_a_layout_asks_of_machines_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_torch(monkeypatch, CPU)
    texts = []
    for overrides in ([], ["--set", "parallel.chunks=5", "--set", "train.batch_size=2112"]):
        assert main(["doctor", "--dry-run", "--json", str(BLOOM), *overrides]) == 0
        checks = json.loads(capsys.readouterr().out)["configuration"]
        outline = [check["text"] for check in checks if check["name"] == doctor.OUTLINE]
        texts += [" ".join(["$ guardrail doctor --dry-run", BLOOM.name, *overrides]), *outline, ""]
        assert all(check["level"] != "problem" for check in checks)
        last = checks[-1]
        assert (last["name"], last["level"]) == (doctor.CONFIGURATION, "ok")
        assert "384 ranks" in last["text"]
        lacking = [check["text"] for check in checks if check["name"] == doctor.ELSEWHERE]
        assert any("48 nodes" in text for text in lacking), "their network was not checked"
    assert_golden("dry_run.txt", "\n".join(texts))
    # Without it, what this machine lacks counts.
    assert main(["doctor", str(BLOOM)]) == 2


def test_a_dry_run_finds_what_is_wrong_on_any_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_torch(monkeypatch, CPU)
    assert main(["doctor", "--dry-run", str(BLOOM), "--set", "parallel.tp=5"]) == 2
    assert "divisor of 384" in capsys.readouterr().out
    assert main(["doctor", "--dry-run"]) == 2
    assert "--dry-run CONFIG.toml" in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, pytest.param(False, marks=pytest.mark.fault("B7"))])
def test_a_gpu_whose_use_cannot_be_read_is_named(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch(monkeypatch, GPU)
    found = importlib.util.find_spec
    spec = found("json") if installed else None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: spec if name == "pynvml" else found(name, *more),
    )
    texts = [check.text for check in doctor.check_machine().machine if check.name == "GPU use"]
    assert bool(texts) is not installed and all(
        "pip install 'guardrail[gpu]'" in text for text in texts
    )
    with_torch(monkeypatch, CPU)
    assert not [check for check in doctor.check_machine().machine if check.name == "GPU use"], (
        "without a GPU it is not missed"
    )
