"""For people: counts, rates, durations, sizes, and text from outside made safe and short."""

from __future__ import annotations

import math
import time

from guardrail.core.text import clean, plural

__all__ = [
    "age",
    "brief",
    "clock",
    "count",
    "countdown",
    "duration",
    "metric",
    "plural",
    "size",
    "spoken",
]

_LIMIT = 500  # characters of any one text from outside that can matter on a screen
# Joiners and variation selectors: what they join has a width that terminals disagree about.
_JOINERS = dict.fromkeys([0x200B, 0x200C, 0x200D, 0x2060, *range(0xFE00, 0xFE10)])


def brief(text: object, limit: int = _LIMIT) -> str:
    """Cleaned text of at most `limit` characters; of ten megabytes only the beginning is looked
    at.
    """
    raw = text if isinstance(text, str) else str(text)
    return clean(raw[: 10 * limit].translate(_JOINERS), limit)


def count(value: float) -> str:
    """1284 -> "1,284"."""
    return f"{int(value):,}" if math.isfinite(value) else "?"


def metric(value: float) -> str:
    """A count with a unit in at most five characters: 8.1k, 131M; "–" for what is unknown."""
    if not math.isfinite(value) or value < 0:
        return "–"
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g}{unit}" if unit or value != int(value) else f"{value:.0f}"
        value /= 1000
    return f"{value:.2g}P"


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front from one day on."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–:--:--"
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def spoken(seconds: float) -> str:
    """A duration in words: "4 s", "2 min 10 s", "1 h 5 min"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "an unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole // 60 % 60} min" if whole // 60 % 60 else "")


def age(seconds: float) -> str:
    """A duration in one unit, at most six characters: "9 s", "12 min", "3 h", "2 d"; "–" where it
    is unknown.
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    for unit_seconds, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_seconds:
            return f"{int(seconds // unit_seconds):,} {unit}"
    return f"{int(seconds)} s"


def countdown(seconds: float) -> str:
    """m:ss, from one hour on h:mm:ss."""
    whole = max(0, math.ceil(seconds))
    minutes = f"{whole // 60}:{whole % 60:02d}"
    return minutes if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size(value: float) -> str:
    """Bytes: "41 MB" (powers of 1000, as disks are sold and `ls --si` counts)."""
    if value <= 0:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def clock(when: float) -> str:
    """Local wall time hh:mm:ss of a time stamp; dashes for one that is none, as 0 is."""
    if not when > 0:
        return "--:--:--"
    try:
        return time.strftime("%H:%M:%S", time.localtime(when))
    except (OverflowError, ValueError, OSError):
        return "--:--:--"
