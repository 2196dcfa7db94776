"""Numbers, durations, names and paths as the report shows them. Pure."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable

from guardrail.core.format import countdown

COLUMNS = 110  # of a line of the report
_UNIT = re.compile(r"(?<=\d) (?=(?:s|h|d|%|B|kB|MB|GB|TB)\b|%)")
_TIED = "\0"  # stands between a number and its unit; cleaned text has no such character
_SIGNALS = {
    "grad_norm": "grad norm",
    "embed_grad_norm": "embed norm",
    "embed_share": "embed share",
}


def format_number(value: float) -> str:
    """Three significant digits: "1.1", "105", "1,640"."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if 1000 <= abs(value) < 1e7:
        rounded = round(value, 2 - int(math.log10(abs(value))))
        return f"{rounded:,.0f}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """ "0.7 s", "21 s", "1:57", "2.3 h", "4.2 d"; "-" where it was not measured."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3599.5:
        return countdown(round(seconds))
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"


def format_clock(seconds: float) -> str:
    """How long a run took: "1:57", "12:03:44"."""
    return countdown(int(seconds))


def format_share(share: float) -> str:
    """ "2.4 %"."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def format_signal(signal: str) -> str:
    """The name of a signal for a reader: "grad norm", "grad norm of blocks.0"."""
    name, slash, block = signal.partition("/")
    shown = _SIGNALS.get(name, name.replace("_", " "))
    return f"{shown} of {block}" if slash else shown


def shorten(text: str, width: int) -> str:
    """Text of at most `width` characters; a longer one ends in an ellipsis."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def shorten_path(path: str, width: int) -> str:
    """A path of at most `width` characters; of a longer one the end is kept."""
    return path if len(path) <= width else "…" + path[len(path) - width + 1 :]


def wrap_text(text: str, *, indent: str = "", width: int = COLUMNS) -> list[str]:
    """Lines of at most `width` characters; a number and its unit stay together."""
    joined = _UNIT.sub(_TIED, text)
    lines = textwrap.wrap(
        joined, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return [line.replace(_TIED, " ") for line in lines]


def relative_path(path: str, folder: str) -> str:
    """The path as seen from `folder`, where it lies below it."""
    below = folder.rstrip("/") + "/"
    return path[len(below) :] if folder and path.startswith(below) else path


def join_words(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *others, last = list(words) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def file_name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path
