"""Counts, numbers, durations, sizes and outside text as a reader sees them.

`-` or `–` stands for what was not measured. Every room formats its numbers with these functions.
"""

from __future__ import annotations

import math
import time

from guardrail.core.text import clean_text

_LIMIT = 500  # characters of one outside text that a screen can show
# Joiners and variation selectors: terminals disagree about the width of what they join.
_JOINERS = dict.fromkeys([0x200B, 0x200C, 0x200D, 0x2060, *range(0xFE00, 0xFE10)])


def clean_and_shorten(text: object, limit: int = _LIMIT) -> str:
    """Return cleaned text of at most `limit` characters.

    Only the first `10 * limit` characters are read, so ten megabytes cost no time.
    """
    raw = text if isinstance(text, str) else str(text)
    return clean_text(raw[: 10 * limit].translate(_JOINERS), limit)


# -- counts and numbers


def format_plural(number: int, noun: str) -> str:
    """Return a count with its noun: "1 batch", "2 batches"."""
    if number == 1:
        return f"{number:,} {noun}"
    ending = "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number:,} {noun}{ending}"


def format_count(value: float) -> str:
    """Return 1284 as "1,284", and "?" for NaN and Inf."""
    return f"{int(value):,}" if math.isfinite(value) else "?"


def format_short_count(value: float) -> str:
    """Return a count with a unit in at most five characters: "8.1k", "131M", or "–"."""
    if not math.isfinite(value) or value < 0:
        return "–"
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5:
            is_integer = not unit and value == int(value)
            return f"{value:.0f}" if is_integer else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.2g}P"


def format_number(value: float) -> str:
    """Return three significant digits: "1.1", "105", "1,640"."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if 1000 <= abs(value) < 1e7:
        rounded = round(value, 2 - int(math.log10(abs(value))))
        return f"{rounded:,.0f}"
    return f"{value:.3g}"


def format_share(share: float) -> str:
    """Return a fraction of 1 in percent: "2.4 %"."""
    percent = 100 * share
    return f"{percent:.2g} %" if share < 0.995 else f"{percent:.0f} %"


def format_size(value: float) -> str:
    """Return a number of bytes as "41 MB", in powers of 1000, as `ls --si` counts."""
    if value <= 0:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_gib(count: float) -> str:
    """Return a number of bytes as "7.8 GiB" or "96.0 MiB", in powers of 1024, as memory is sold."""
    if count < 1 << 30:
        return f"{count / (1 << 20):.1f} MiB"
    return f"{count / (1 << 30):.1f} GiB"


# -- durations


def format_elapsed(seconds: float) -> str:
    """Return "h:mm:ss", with the days in front from one day on: "1d 1:01:01"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–:--:--"
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def format_countdown(seconds: float) -> str:
    """Return "m:ss", from one hour on "h:mm:ss". Fractions are rounded up."""
    rounded = max(0, math.ceil(seconds))
    if rounded < 3600:
        return f"{rounded // 60}:{rounded % 60:02d}"
    return f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"


def format_run_time(seconds: float) -> str:
    """Return how long a run took: "1:57", "12:03:44". Fractions are rounded down."""
    return format_countdown(int(seconds))


def format_duration(seconds: float) -> str:
    """Return "0.7 s", "21 s", "1:57", "2.3 h" or "4.2 d", and "-" for an unknown duration."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3599.5:
        return format_countdown(round(seconds))
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"


def format_seconds_in_words(seconds: float) -> str:
    """Return a duration in words: "4 s", "2 min 10 s", "1 h 5 min"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "an unknown time"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return _join_units(rounded // 60, "min", rounded % 60, "s")
    return _join_units(rounded // 3600, "h", rounded // 60 % 60, "min")


def _join_units(large: int, large_unit: str, small: int, small_unit: str) -> str:
    text = f"{large} {large_unit}"
    return f"{text} {small} {small_unit}" if small else text


def format_age(seconds: float) -> str:
    """Return a duration in one unit, in at most six characters: "9 s", "12 min", "3 h", "2 d".

    An unknown duration is "–".
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    for unit_seconds, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_seconds:
            return f"{int(seconds // unit_seconds):,} {unit}"
    return f"{int(seconds)} s"


# -- times of day


def format_time_of_day(when: float) -> str:
    """Return the local time "hh:mm:ss" of a time stamp, or dashes for an impossible one, as 0."""
    if not when > 0:
        return "--:--:--"
    try:
        return time.strftime("%H:%M:%S", time.localtime(when))
    except (OverflowError, ValueError, OSError):
        return "--:--:--"
