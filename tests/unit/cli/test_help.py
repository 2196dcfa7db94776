"""The help of `guardrail` and of every subcommand, as a golden file."""

from __future__ import annotations

from importlib import metadata

import click
import pytest

from guardrail.cli.main import COMMANDS, guardrail
from tests.support.golden import assert_golden

WIDTH = 80


def help_text(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `guardrail WORDS... --help` prints on a terminal of WIDTH columns."""
    command: click.Command = guardrail
    context = click.Context(
        command, info_name="guardrail", terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )
    for word in words:
        found = guardrail.get_command(context, word)
        assert found is not None
        command = found
        context = click.Context(
            command,
            info_name=word,
            parent=context,
            terminal_width=WIDTH,
            help_option_names=["-h", "--help"],
        )
    # click keeps the help option that an earlier test may have made, without -h.
    monkeypatch.setattr(command, "_help_option", None, raising=False)
    return command.get_help(context)


@pytest.mark.skipif(
    metadata.version("click").startswith(("8.1.", "8.2.")),
    reason="click 8.1 words defaults and ranges differently",
)
def test_help_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARDRAIL_ROOT", raising=False)
    parts = []
    for words in ([], *([name] for name in COMMANDS)):
        title = " ".join(["guardrail", *words, "--help"])
        parts.append(f"$ {title}\n\n{help_text(words, monkeypatch)}\n")
    text = "\n".join(parts)
    assert_golden("help.txt", text)
