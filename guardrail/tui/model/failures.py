"""What the screen says of its own failures, and of files of a run directory that are damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

from guardrail.core.errors import GuardrailError
from guardrail.core.format import format_plural
from guardrail.rundir.run_directory import RunDirectory

SAID_SECONDS = 30.0  # how long the screen says that something has failed


class Failures:
    """The newest failure of each part of the reader; parts live on threads of their own."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, float]] = {}

    def add(self, part: str, text: str) -> None:
        self._known = {**self._known, part: (text, time.monotonic())}

    def said(self, now: str = "") -> str:
        """`now`, what is wrong at this moment, and what has failed lately."""
        oldest = time.monotonic() - SAID_SECONDS
        lately = [text for text, when in self._known.values() if when > oldest]
        return "; ".join([now, *lately] if now else lately)


def is_gone(path: Path) -> bool:
    """Whether a directory is not there any more; that a file system does not answer raises
    OSError.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def find_damage(
    run: RunDirectory,
    *,
    status_known: bool,
    status_read: bool,
    journal_known: bool,
    unreadable: int,
    journal_cut: bool,
    rows: tuple[int, int],
) -> tuple[str, ...]:
    """Files of a run that are missing, unreadable or cut, each in a few words.

    Args:
        status_known: a status was read once; `status_read`: at the last look.
        journal_known: the journal had lines.
        unreadable: lines of the journal that are no events; `journal_cut`: it has lost lines that
        were read.
        rows: how many metrics.bin had before it was cut, and has now.
    """
    found = []
    status = run.path / "status.json"
    if not status_read and status.exists():
        found.append("status.json unreadable")
    elif status_known and not status.exists():
        found.append("status.json missing")
    if unreadable:
        found.append(format_plural(unreadable, "unreadable journal line"))
    if journal_known and not run.journal_path.exists():
        found.append("journal.jsonl missing")
    elif journal_cut:
        found.append("journal.jsonl cut")
    had, has = rows
    if has < had:
        found.append(f"metrics.bin cut from {had:,} to {has:,} rows")
    return tuple(found)


def format_reason(error: Exception) -> str:
    """One line: what the system or guardrail itself says; of anything else its kind as well."""
    if isinstance(error, OSError | GuardrailError):
        return str((error.strerror if isinstance(error, OSError) else None) or error)
    return f"{type(error).__name__}: {error}"
