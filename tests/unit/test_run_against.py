"""The marked tests run over the product of an older commit, or the tool says why they cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.imported_modules import (
    describe_commit,
    imported_names,
    module_names,
    modules_of_commit,
    oldest_commit_with,
    product_imports,
)
from tests.support.run_against import Outcomes, explain_refusal, marked_files, run_against

LIMIT_TEST = """
import pytest
from tests.support.helper import LIMIT

@pytest.mark.fault("R1")
def test_limit():
    assert LIMIT == 2

@pytest.mark.fault("R2")
def test_limit_is_positive():
    assert LIMIT > 0

@pytest.mark.fault("R3")
def test_name_that_came_with_the_fix():
    from guardrail.core.limits import UNIT

@pytest.mark.fault("R4")
@pytest.mark.skip
def test_skipped():
    pass

def test_without_mark():
    assert LIMIT > 2
"""
MANIFEST_TEST = """
import pytest

@pytest.mark.fault("R5")
def test_manifest():
    import guardrail.manifest as manifest
    assert manifest.VERSION == 1
"""


class Repository:
    """A repository of four commits.

    `flat` has guardrail/limits.py. `moved` has the present layout. `fixed` corrects the limit.
    HEAD changes only a test.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._git("init", "-q")
        self._write("guardrail/__init__.py", "")
        self._write("guardrail/manifest.py", "VERSION = 1\n")
        self._write("guardrail/limits.py", "LIMIT = 1\n")
        self._write("trainer/__init__.py", "")
        self.flat = self._commit("flat")
        self._write("guardrail/core/__init__.py", "")
        (folder / "guardrail/limits.py").rename(folder / "guardrail/core/limits.py")
        self.moved = self._commit("moved")
        self._write("guardrail/core/limits.py", "LIMIT = 2\nUNIT = 'steps'\n")
        self.fixed = self._commit("fixed")
        self._write("tests/__init__.py", "")
        self._write("tests/support/__init__.py", "")
        self._write("tests/support/helper.py", "from guardrail.core.limits import LIMIT\n")
        self._write("tests/test_limits.py", LIMIT_TEST)
        self._write("tests/test_manifest.py", MANIFEST_TEST)
        self._write("tests/test_other.py", "import guardrail.core\n")
        self.head = self._commit("tests")

    def _write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def _commit(self, message: str) -> str:
        self._git("add", "-A")
        self._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", message)
        return self._git("rev-parse", "HEAD").strip()

    def _git(self, *arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "repository").mkdir()
    return Repository(tmp_path / "repository")


def test_module_names() -> None:
    paths = ["guardrail/__init__.py", "guardrail/core/text.py", "guardrail/py.typed"]
    assert module_names(paths) == {"guardrail", "guardrail.core.text"}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b", ["a.b"]),
        ("from a.b import c, d", ["a.b", "a.b.c", "a.b.d"]),
        ("def f():\n    from a import b", ["a", "a.b"]),
        ("from . import b", []),
    ],
)
def test_imported_names(source: str, names: list[str]) -> None:
    assert list(imported_names(source)) == names


def test_imports_are_followed_through_helpers(repository: Repository) -> None:
    test = repository.folder / "tests/test_limits.py"
    assert product_imports(repository.folder, test) == {"guardrail.core.limits"}
    other = repository.folder / "tests/test_other.py"
    assert product_imports(repository.folder, other) == {"guardrail.core"}


def test_imports_of_a_conftest_count(repository: Repository) -> None:
    (repository.folder / "tests/conftest.py").write_text("from guardrail import manifest\n")
    test = repository.folder / "tests/test_other.py"
    needed = {"guardrail", "guardrail.core", "guardrail.manifest"}
    assert product_imports(repository.folder, test) == needed


def test_modules_of_commits(repository: Repository) -> None:
    flat = {"guardrail", "guardrail.limits", "guardrail.manifest", "trainer"}
    assert modules_of_commit(repository.folder, repository.flat) == flat
    limits = {"guardrail.core.limits"}
    assert oldest_commit_with(repository.folder, limits) == repository.moved
    assert oldest_commit_with(repository.folder, {"guardrail.manifest"}) == repository.flat
    assert oldest_commit_with(repository.folder, {"guardrail.none"}) is None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["test_limits.py", "test_manifest.py"]),
        (["-n", "2"], ["test_limits.py", "test_manifest.py"]),
        (["tests"], ["test_limits.py", "test_manifest.py"]),
        (["tests/test_manifest.py::test_manifest"], ["test_manifest.py"]),
        (["tests/test_other.py"], []),
    ],
)
def test_marked_files(repository: Repository, arguments: list[str], names: list[str]) -> None:
    assert [file.name for file in marked_files(repository.folder, arguments)] == names


def test_commit_of_another_layout_is_refused(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_against(repository.flat, [], repository=repository.folder) == 2
    assert capsys.readouterr().err == (
        f"{repository.flat} cannot be compared: it lacks 1 of the 2 modules that the tests import,"
        " the first is guardrail.core.limits.\n"
        f"The oldest commit with all of them is {describe_commit(repository.folder, repository.moved)}.\n"
        "1 of 2 test files need none of these. Name them:\n"
        "  tests/test_manifest.py\n"
    )


def test_files_that_need_no_missing_module_are_compared(repository: Repository) -> None:
    folder = repository.folder
    files = marked_files(folder, ["tests/test_manifest.py"])
    assert explain_refusal(folder, folder, repository.flat, files) == ""
    assert "no test is marked" in explain_refusal(folder, folder, repository.flat, [])


def test_unknown_commit_is_refused(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_against("none", [], repository=repository.folder) == 2
    assert capsys.readouterr().err == "none: no such commit\n"


def test_each_marked_test_is_named_by_what_became_of_it(
    repository: Repository, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the test of the fault fails; a missing name and a skip are no failure."""
    arguments = ["-p", "no:cacheprovider"]
    assert run_against(repository.moved, arguments, repository=repository.folder) == 1
    output = capfd.readouterr().out
    assert output[output.index("\nmarked tests over") :] == (
        f"\nmarked tests over {repository.moved}: 1 failed\n"
        "2 passed: the commit has the fix, or the test does not need it\n"
        "  tests.test_limits::test_limit_is_positive\n"
        "  tests.test_manifest::test_manifest\n"
        "1 skipped\n"
        "  tests.test_limits::test_skipped\n"
        "1 not run: the commit lacks a name that the test needs\n"
        "  tests.test_limits::test_name_that_came_with_the_fix\n"
    )


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (Outcomes(failed=["a"]), 0),
        (Outcomes(failed=["a"], skipped=["b"]), 0),
        (Outcomes(failed=["a"], passed=["b"]), 1),
        (Outcomes(failed=["a"], not_run=["b"]), 1),
        (Outcomes(skipped=["a"]), 1),
    ],
)
def test_exit_code(outcomes: Outcomes, code: int) -> None:
    assert outcomes.exit_code() == code
