"""docs/ is checked: generated pages are fresh, TOML is configuration, commands and links exist."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from guardrail.cli.main import COMMANDS
from guardrail.core.config import GuardConfig
from guardrail.core.schema import convert_tree
from tests.support import make_docs
from tests.support.places import ROOT
from trainer.config import Config

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks_of(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    return [(path.name, block) for path in PAGES for block in blocks_of(path, language)]


def command_lines() -> list[tuple[str, str]]:
    """Each line of a shell block that calls guardrail, without its comment."""
    found = []
    for page, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("guardrail "):
                found.append((page, line.strip()))
    return found


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_generated_pages_are_fresh(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == make_docs.PAGES[name](), "run: python -m tests.support.make_docs"


@pytest.mark.parametrize(("page", "block"), blocks("toml"))
def test_every_piece_of_toml_is_configuration(page: str, block: str) -> None:
    tree = tomllib.loads(block)
    schema = GuardConfig if set(tree) <= set(GuardConfig.__struct_fields__) else Config
    convert_tree(tree, schema, file=page)


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_line_is_one_that_guardrail_takes(page: str, line: str) -> None:
    """Its command, arguments and options are parsed as on a command line; nothing is run."""
    words = shlex.split(line, comments=True)
    pipe = [at for at, word in enumerate(words) if word in ("|", ">", "&&", "2>", ">>")]
    words = words[: pipe[0]] if pipe else words
    name, *arguments = words[1:] or ["--help"]
    if name.startswith("-"):
        return
    assert name in COMMANDS, f"{page}: no such command: {name}"
    command: click.Command = importlib.import_module(f"guardrail.cli.{name}").command
    try:
        command.make_context(name, arguments)
    except click.exceptions.Exit:
        pass  # --help


def test_every_link_to_a_file_leads_somewhere() -> None:
    broken = []
    for path in [*PAGES, ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not link.startswith(("http://", "https://", "mailto:")):
                if not (path.parent / link).exists():
                    broken.append(f"{path.name}: {link}")
    assert not broken


def test_files_that_the_pages_name_exist() -> None:
    """Paths in backticks such as `guardrail/core/config.py` and `tests/parallel/test_law.py`."""
    missing = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        pattern = r"`((?:guardrail|trainer|tests|demo|configs)/[\w./-]+\.(?:py|toml|md|sbatch))`"
        for name in re.findall(pattern, text):
            if "NAME" not in name and not (ROOT / name).exists():
                missing.append(f"{path.name}: {name}")
    assert not missing
