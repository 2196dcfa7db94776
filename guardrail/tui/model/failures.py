"""Failures of the screen itself, and files of a run directory that are damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path

from guardrail.core.errors import GuardrailError
from guardrail.core.format import format_plural
from guardrail.rundir.run_directory import RunDirectory

SHOWN_SECONDS = 30.0  # how long a failure is shown


class Failures:
    """The newest failure of each part of the reader; the parts run on different threads."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, float]] = {}

    def add(self, part: str, text: str) -> None:
        self._known = {**self._known, part: (text, time.monotonic())}

    def recent(self, now: str = "") -> str:
        """Return `now`, what is wrong at this moment, and the failures of the last 30 s."""
        oldest = time.monotonic() - SHOWN_SECONDS
        texts = [now] if now else []
        texts += [text for text, when in self._known.values() if when > oldest]
        return "; ".join(texts)


def is_gone(path: Path) -> bool:
    """Return whether a directory no longer exists.

    Raises:
        OSError: the file system does not answer.
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
    """Return the files of a run that are missing, unreadable or cut, each in a few words.

    Args:
        status_known: a status was read once; `status_read`: at the last read.
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
    """Return one line: the text of a known error, and the kind as well of any other."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    if isinstance(error, GuardrailError):
        return str(error)
    return f"{type(error).__name__}: {error}"
