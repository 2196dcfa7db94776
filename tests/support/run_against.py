"""Run the marked tests over the product of an older commit.

Where the commit lacks the fix of a fault, the tests of that fault must fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.imported_modules import (
    PRODUCT,
    describe_commit,
    modules_of_commit,
    oldest_commit_with,
    product_imports,
)
from tests.support.places import ROOT

# What pytest reports if a test needs a module or a name that the older product does not have.
# Such a test says nothing about the fault.
MISSING_NAME_ERRORS = (
    "collection failure",
    "ImportError",
    "ModuleNotFoundError",
    "AttributeError: module",
    "AttributeError: <module",
)


@dataclass
class Outcomes:
    """The names of the tests, by what became of them.

    Attributes:
        not_run: they need a module or a name that the older product lacks.
    """

    failed: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def exit_code(self) -> int:
        """Return 0 if each marked test ran and failed, but for skipped ones."""
        if self.passed or self.not_run:
            return 1
        return 0 if self.failed else 1


def run_against(revision: str, arguments: list[str], *, repository: Path = ROOT) -> int:
    """Run the marked tests of HEAD over the product of `revision`, and print the result.

    Args:
        arguments: for pytest. Without a file or folder among them all marked tests run.

    Returns:
        0 if each marked test ran and failed. 1 if one passed or could not run. 2 if the commit
        cannot be compared.
    """
    commit = _resolve(repository, revision)
    if commit is None:
        print(f"{revision}: no such commit", file=sys.stderr)
        return 2
    with _checked_out_head(repository) as tree:
        refusal = explain_refusal(repository, tree, commit, marked_files(tree, arguments))
        if refusal:
            print(f"{revision} {refusal}", file=sys.stderr)
            return 2
        outcomes = _run_tests(tree, commit, arguments)
    if outcomes is None:
        print(f"no test could start over {revision}", file=sys.stderr)
        return 2
    print_outcomes(revision, outcomes)
    return outcomes.exit_code()


def marked_files(tree: Path, arguments: list[str]) -> list[Path]:
    """Return the test files with a marked test, of those that the arguments name."""
    named = [tree / argument.split("::")[0] for argument in arguments]
    named = [path for path in named if path.exists()]
    files: list[Path] = []
    for path in named or [tree / "tests"]:
        files += path.rglob("test_*.py") if path.is_dir() else [path]
    return sorted(file for file in set(files) if "mark.fault(" in file.read_text(encoding="utf-8"))


def explain_refusal(repository: Path, tree: Path, commit: str, tests: list[Path]) -> str:
    """Return why the commit cannot be compared, and with what it can; "": it can.

    Args:
        tree: HEAD, checked out.
        tests: the test files that would run.
    """
    if not tests:
        return "cannot be compared: no test is marked"
    present = modules_of_commit(repository, commit)
    needed: set[str] = set()
    comparable = []
    for test in tests:
        imports = product_imports(tree, test)
        needed |= imports
        if imports <= present:
            comparable.append(test.relative_to(tree).as_posix())
    lacking = sorted(needed - present)
    if not lacking:
        return ""
    lines = [
        f"cannot be compared: it lacks {len(lacking)} of the {len(needed)} modules that the tests"
        f" import, the first is {lacking[0]}."
    ]
    oldest = oldest_commit_with(repository, needed)
    if oldest is not None:
        lines.append(
            f"The oldest commit with all of them is {describe_commit(repository, oldest)}."
        )
    if comparable:
        lines.append(f"{len(comparable)} of {len(tests)} test files need none of these. Name them:")
        lines += [f"  {name}" for name in comparable]
    return "\n".join(lines)


def read_outcomes(report: Path) -> Outcomes:
    """Read pytest's JUnit file."""
    outcomes = Outcomes()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = "::".join(filter(None, [case.get("classname"), case.get("name")]))
        results = {child.tag: child.get("message", "") for child in case}
        messages = [results[tag] for tag in ("failure", "error") if tag in results]
        if any(message.startswith(MISSING_NAME_ERRORS) for message in messages):
            outcomes.not_run.append(name)
        elif messages:
            outcomes.failed.append(name)
        elif "skipped" in results:
            outcomes.skipped.append(name)
        else:
            outcomes.passed.append(name)
    return outcomes


def print_outcomes(revision: str, outcomes: Outcomes) -> None:
    print(f"\nmarked tests over {revision}: {len(outcomes.failed)} failed")
    _print_names("passed: the commit has the fix, or the test does not need it", outcomes.passed)
    _print_names("skipped", outcomes.skipped)
    _print_names("not run: the commit lacks a name that the test needs", outcomes.not_run)


def _print_names(what: str, names: list[str]) -> None:
    if names:
        print(f"{len(names)} {what}")
    for name in names:
        print(f"  {name}")


def _resolve(repository: Path, revision: str) -> str | None:
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    output = subprocess.run(command, cwd=repository, check=False, capture_output=True, text=True)
    return output.stdout.strip() or None


@contextmanager
def _checked_out_head(repository: Path) -> Iterator[Path]:
    """Check out HEAD into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="guardrail-old-") as folder:
        tree = Path(folder) / "tree"
        add = ["git", "worktree", "add", "--detach", "-q", str(tree), "HEAD"]
        subprocess.run(add, cwd=repository, check=True)
        try:
            yield tree
        finally:
            remove = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(remove, cwd=repository, check=True)


def _run_tests(tree: Path, commit: str, arguments: list[str]) -> Outcomes | None:
    """Replace the product in `tree` by that of `commit` and run the marked tests.

    None: pytest ended without a report.
    """
    for package in PRODUCT:
        shutil.rmtree(tree / package)
    subprocess.run(["git", "checkout", "-q", commit, "--", *PRODUCT], cwd=tree, check=True)
    report = tree.parent / "report.xml"
    # Without the last option one file that cannot be imported would keep all others from running.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "fault", f"--junitxml={report}"]
    command += [*arguments, "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=False)
    return read_outcomes(report) if report.exists() else None
