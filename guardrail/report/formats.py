"""Names, paths and lines of text as the report shows them. Pure."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable

COLUMNS = 110  # most characters of a line of the report
_UNIT = re.compile(r"(?<=\d) (?=(?:s|h|d|%|B|kB|MB|GB|TB)\b|%)")
_TIED = "\0"  # between a number and its unit; cleaned text has no such character
_SIGNALS = {
    "grad_norm": "grad norm",
    "embed_grad_norm": "embed norm",
    "embed_share": "embed share",
}


def format_signal(signal: str) -> str:
    """Return the name of a signal for a reader: "grad norm", "grad norm of blocks.0"."""
    name, slash, block = signal.partition("/")
    shown = _SIGNALS.get(name, name.replace("_", " "))
    if slash:
        return f"{shown} of {block}"
    return shown


def shorten(text: str, width: int) -> str:
    """Return at most `width` characters of a text; a shortened one ends in an ellipsis."""
    if len(text) <= width:
        return text
    return text[: max(0, width - 1)] + "…"


def shorten_path(path: str, width: int) -> str:
    """Return at most `width` characters of a path. The end is kept."""
    if len(path) <= width:
        return path
    return "…" + path[len(path) - width + 1 :]


def wrap_text(text: str, *, indent: str = "", width: int = COLUMNS) -> list[str]:
    """Return lines of at most `width` characters. A number and its unit stay together."""
    joined = _UNIT.sub(_TIED, text)
    lines = textwrap.wrap(
        joined, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return [line.replace(_TIED, " ") for line in lines]


def relative_path(path: str, folder: str) -> str:
    """Return a path relative to `folder`, if it lies below it."""
    below = folder.rstrip("/") + "/"
    if folder and path.startswith(below):
        return path[len(below) :]
    return path


def join_words(words: Iterable[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    *others, last = list(words) or [""]
    if others:
        return f"{', '.join(others)} and {last}"
    return last


def file_name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path
