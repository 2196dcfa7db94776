"""Send the terminal only the cells that changed, and colours only where they change.

Textual's own partial update writes each row from the left edge of its widget, and every piece of
text with all its colours and a reset. On a quiet screen that is three times as many bytes, all day
long, often over SSH.

This uses the private class `textual._compositor.ChopsUpdate` and its attributes `chops`, `spans` and
`chop_ends`. Where one of them is missing, textual's own update is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from rich.color import Color, ColorSystem
from rich.console import COLOR_SYSTEMS, Console
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

# SGR codes of attributes, foreground and background; "" is the terminal's default
SgrCodes = tuple[str, str, str]
_DEFAULT: SgrCodes = ("", "", "")
_DEFAULT_COLOURS = ("39", "49")  # codes of the default foreground and background


class PartialUpdate(Protocol):
    """What is used of textual's update.

    Attributes:
        chops: for each row, x -> strip, in the order of x.
        spans: (y, x1, x2) of the cells that may have changed.
        chop_ends: for each row, where each of its strips ends.
    """

    @property
    def chops(self) -> Sequence[Mapping[int, Strip | None]]: ...
    @property
    def spans(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def chop_ends(self) -> Sequence[Sequence[int]]: ...


def send_cells_only(update: Any) -> Any:
    """Make a partial update of textual write the changed cells only; return it.

    Everything else is returned unchanged: it is drawn as textual draws it.
    """
    compositor = sys.modules.get("textual._compositor")
    partial = getattr(compositor, "ChopsUpdate", None)
    if partial is None or not isinstance(update, partial):
        return update
    if all(hasattr(update, name) for name in ("chops", "spans", "chop_ends")):
        # textual calls this method of an update for what it writes
        update.render_segments = lambda console: render_cells(update, console)
    return update


def render_cells(update: PartialUpdate, console: Console) -> str:
    """Return what a terminal must be sent for the changed cells."""
    system = COLOR_SYSTEMS.get(console.color_system or "", ColorSystem.TRUECOLOR)
    written: list[str] = []
    codes = _DEFAULT
    row, column = -1, -1  # of the terminal's cursor
    for y, x, segments in _changed_pieces(update):
        if y != row:
            written.append(f"\x1b[{y + 1};{x + 1}H")
        elif x != column:
            written.append(f"\x1b[{x - column}C")
        row, column = y, x
        for segment in segments:
            if not segment.text:
                continue
            wanted = sgr_codes(segment.style or Style.null(), system)
            written.append(_change_codes(codes, wanted) + segment.text)
            codes = wanted
            column += segment.cell_length
    return "".join(written) + _change_codes(codes, _DEFAULT)


def _changed_pieces(update: PartialUpdate) -> Iterator[tuple[int, int, list[Segment]]]:
    """Yield (y, x, segments) of the changed spans, from left to right and from top to bottom."""
    for y, x1, x2 in update.spans:
        for end, (x, strip) in zip(update.chop_ends[y], update.chops[y].items(), strict=True):
            first, last = max(x, x1), min(end, x2)
            if strip is not None and first < last:
                yield y, first, list(strip.crop(first - x, last - x))


@lru_cache(maxsize=4096)
def sgr_codes(style: Style, system: ColorSystem) -> SgrCodes:
    """Return the SGR codes of a style on a terminal with these colours."""
    return (
        _attribute_codes(style, system),
        _colour_codes(style.color, system, foreground=True),
        _colour_codes(style.bgcolor, system, foreground=False),
    )


def _attribute_codes(style: Style, system: ColorSystem) -> str:
    """Return the codes of bold, italic and so on: "1;3"."""
    attributes_only = style.without_color.update_link(None)
    rendered = attributes_only.render(" ", color_system=system)
    if rendered == " ":
        return ""
    return rendered.removeprefix("\x1b[").partition("m")[0]


def _colour_codes(colour: Color | None, system: ColorSystem, *, foreground: bool) -> str:
    if colour is None:
        return ""
    return ";".join(colour.downgrade(system).get_ansi_codes(foreground=foreground))


def _change_codes(before: SgrCodes, wanted: SgrCodes) -> str:
    """Return the sequence that changes one set of codes into another.

    Attributes can only be reset all at once.
    """
    if before == wanted:
        return ""
    if before[0] != wanted[0]:
        return f"\x1b[{';'.join(('0', *filter(None, wanted)))}m" if any(wanted) else "\x1b[0m"
    changed: list[str] = []
    for old, new, default in zip(before[1:], wanted[1:], _DEFAULT_COLOURS, strict=True):
        if old != new:
            changed.append(new or default)
    return f"\x1b[{';'.join(changed)}m"
