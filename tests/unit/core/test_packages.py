"""What works without the optional packages, and what the rest says."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from guardrail.core.packages import EXTRA_OF, MissingPackage, install_hint, require_package
from tests.support.oldest import oldest_versions
from tests.support.places import ROOT, TESTS

OPTIONAL = ("torch", "accelerate", "tokenizers", "zstandard", "tensorboard", "matplotlib", "wandb")
OLD_RUN = TESTS / "cases" / "old_runs" / "before_rename"


def run_without(packages: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in an interpreter in which these packages cannot be imported."""
    block = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", block + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    code = f"sys.argv = {['guardrail', *words]!r}\nfrom guardrail.cli.main import main\nsys.exit(main())"
    return run_without(OPTIONAL, code)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("runs", "--help"),
        ("report", str(OLD_RUN)),
        ("report", str(OLD_RUN), "--json"),
        ("backtest", str(OLD_RUN)),
        ("doctor", "--help"),
        ("view", "--help"),
    ],
)
def test_the_core_needs_no_optional_package(words: tuple[str, ...]) -> None:
    done = run_command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_screen_needs_no_optional_package() -> None:
    done = run_without(OPTIONAL, "import guardrail.tui.app.app, guardrail.tui.screens.dashboard")
    assert (done.returncode, done.stderr) == (0, "")


def test_guard_names_the_package_that_it_needs() -> None:
    done = run_without(OPTIONAL, "from guardrail import SampleOrder, load_config, Guard")
    assert done.returncode == 1
    assert "MissingPackage: guardrail.Guard needs torch" in done.stderr
    assert install_hint("torch") in done.stderr


@pytest.mark.parametrize("package", ["torch", "accelerate", "tokenizers"])
def test_launch_without_a_package_of_the_trainer(tmp_path: Path, package: str) -> None:
    words = ["guardrail", "launch", "configs/quickstart.toml", "--root", str(tmp_path)]
    code = f"sys.argv = {words!r}\nfrom guardrail.cli.main import main\nsys.exit(main())"
    done = run_without((package,), code)
    assert done.returncode == 2
    assert f"an installed {package}" in done.stderr
    assert install_hint(package) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_launch_without_tensorboard_warns() -> None:
    code = (
        "from guardrail import load_config\n"
        "from guardrail.launch.launcher import package_remarks\n"
        "print(package_remarks(load_config('configs/quickstart.toml')))\n"
    )
    assert install_hint("tensorboard") in run_without(("tensorboard",), code).stdout.replace(
        "\\'", "'"
    )
    assert run_without((), code).stdout.strip() == "[]"


def test_event_files_without_tensorboard(tmp_path: Path) -> None:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    EventFileWriter(str(tmp_path)).close()
    done = run_command("backtest", str(next(tmp_path.iterdir())))
    assert done.returncode == 2
    assert install_hint("tensorboard") in done.stderr


def test_each_optional_package_is_installed_by_the_extra_that_the_hint_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRA_OF.items():
        name = package.replace("_", "-")
        assert any(line.startswith(name) for line in extras[extra]), package
        assert not any(line.startswith(f"{name}>") for line in project["dependencies"])


def test_a_blocked_package_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackage) as caught:
        require_package("wandb", "this test")
    assert caught.value.package == "wandb"


def test_oldest_versions_are_the_lower_bounds() -> None:
    pyproject = (
        '[project]\ndependencies = ["numpy>=1.26", "textual>=8.2,<8.3"]\n'
        '[project.optional-dependencies]\ntrainer = ["torch>=2.9"]\ndev = ["ruff>=0.6"]\n'
    )
    assert oldest_versions(pyproject) == ["numpy==1.26", "textual==8.2", "torch==2.9"]
    with pytest.raises(ValueError, match="numpy"):
        oldest_versions(pyproject.replace("numpy>=1.26", "numpy"))
