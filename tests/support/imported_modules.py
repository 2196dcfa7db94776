"""Which modules of the product the tests import, and which commits have all of them."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

PRODUCT = ("guardrail", "trainer")


def module_names(paths: Iterable[str]) -> set[str]:
    """Return the dotted names of Python files: `guardrail/core/text.py` is `guardrail.core.text`."""
    names = set()
    for path in paths:
        if path.endswith(".py"):
            names.add(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return names


def modules_of_commit(repository: Path, commit: str) -> set[str]:
    """Return the modules of guardrail and trainer at `commit`."""
    return module_names(_git_lines(repository, "ls-tree", "-r", "--name-only", commit, *PRODUCT))


def modules_in_folder(root: Path) -> set[str]:
    """Return the modules of guardrail and trainer in a checked out tree."""
    files: list[Path] = []
    for package in PRODUCT:
        files += (root / package).rglob("*.py")
    return module_names(file.relative_to(root).as_posix() for file in files)


def product_imports(root: Path, test: Path) -> set[str]:
    """Return the modules of the product that a test needs, in the tree at `root`.

    They are those that the test file itself, the conftest files above it, and the helpers in
    tests/ that these import, name in an import at any place of the code.
    """
    known = modules_in_folder(root)
    waiting = [test, *_conftests_above(root, test)]
    read: set[Path] = set()
    needed: set[str] = set()
    while waiting:
        file = waiting.pop()
        if file in read:
            continue
        read.add(file)
        for name in imported_names(file.read_text(encoding="utf-8")):
            if name in known:
                needed.add(name)
            elif helper := _helper_file(root, name):
                waiting.append(helper)
    return needed


def imported_names(source: str) -> Iterator[str]:
    """Yield each module that the source imports, and each name that it imports from one.

    A name may be a module of its own: `from guardrail.core import text`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def oldest_commit_with(repository: Path, modules: set[str]) -> str | None:
    """Return the oldest commit, counted back from HEAD without a gap, that has all modules.

    None: HEAD itself lacks one.
    """
    oldest = None
    for commit in _git_lines(repository, "rev-list", "--first-parent", "HEAD"):
        if not modules <= modules_of_commit(repository, commit):
            break
        oldest = commit
    return oldest


def describe_commit(repository: Path, commit: str) -> str:
    """Return the short hash and the subject of a commit."""
    return _git_lines(repository, "log", "-1", "--format=%h (%s)", commit)[0]


def _conftests_above(root: Path, test: Path) -> list[Path]:
    folders = [folder for folder in test.parents if folder.is_relative_to(root)]
    return [folder / "conftest.py" for folder in folders if (folder / "conftest.py").exists()]


def _helper_file(root: Path, name: str) -> Path | None:
    """Return the file of a module in tests/; None: it is none."""
    if not name.startswith("tests."):
        return None
    file = root / f"{name.replace('.', '/')}.py"
    return file if file.exists() else None


def _git_lines(repository: Path, *arguments: str) -> list[str]:
    command = ["git", *arguments]
    output = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
    return output.stdout.splitlines()
