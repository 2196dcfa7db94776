"""The code keeps its shape: short files, and one expression does one thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.places import ROOT

LONGEST = 400  # lines of a file
TERNARIES = 1.5  # at most, per 100 lines that are not blank
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NEVER_NESTED = (*COMPREHENSIONS, ast.IfExp)

ROOMS = ("guardrail", "trainer", "tests/bench")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def find_nested(tree: ast.AST) -> Iterator[int]:
    """Yield the lines with a ternary or a comprehension inside another one."""
    for outer in ast.walk(tree):
        if not isinstance(outer, NEVER_NESTED):
            continue
        inside = [node for node in ast.walk(outer) if node is not outer]
        if any(isinstance(node, NEVER_NESTED) for node in inside):
            yield outer.lineno


def test_no_file_is_over_400_lines() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_ternary_or_comprehension_stands_in_another() -> None:
    found = []
    for path in SOURCES:
        found += [f"{path}:{line}" for line in find_nested(ast.parse(path.read_text()))]
    assert found == []


@pytest.mark.parametrize("room", ROOMS)
def test_ternaries_are_rare(room: str) -> None:
    lines = ternaries = 0
    for path in sorted((ROOT / room).rglob("*.py")):
        source = path.read_text()
        lines += sum(1 for line in source.splitlines() if line.strip())
        ternaries += sum(isinstance(node, ast.IfExp) for node in ast.walk(ast.parse(source)))
    assert 100 * ternaries <= TERNARIES * lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("a if b else c", []),
        ("[x for x in y]", []),
        ("a if b else (c if d else e)", [1]),
        ("\n[x if x else y for x in z]", [2]),
        ("{k: [x for x in v] for k, v in z}", [1]),
        ("any(x in y for x in [z for z in w])", [1]),
    ],
)
def test_nested_expressions_are_found(source: str, lines: list[int]) -> None:
    assert list(find_nested(ast.parse(source))) == lines
