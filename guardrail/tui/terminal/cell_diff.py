"""What of a frame goes to the terminal: the cells that changed, and colours only where they change.

Textual's own partial update writes each row from the left edge of its widget, and every piece of
text with all its colours and a reset. On a quiet screen that is three times as much, for the whole
day, through somebody's SSH.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate

# SGR codes of attributes, foreground, background; "" is the terminal's own
_Pen = tuple[str, str, str]
_PLAIN: _Pen = ("", "", "")


class CellUpdate(ChopsUpdate):
    """The cells of a partial update, and no others."""

    def __init__(self, update: ChopsUpdate) -> None:
        super().__init__(update.chops, update.spans, update.chop_ends)

    def render_segments(self, console: Console) -> str:
        system = console._color_system or ColorSystem.TRUECOLOR
        written: list[str] = []
        pen = _PLAIN
        row, column = -1, -1  # where the cursor stands
        for y, x, segments in self._pieces():
            if y != row:
                written.append(f"\x1b[{y + 1};{x + 1}H")
            elif x != column:
                written.append(f"\x1b[{x - column}C")
            row, column = y, x
            for segment in segments:
                if not segment.text:
                    continue
                wanted = sgr_codes(segment.style or Style.null(), system)
                written.append(_turn(pen, wanted) + segment.text)
                pen = wanted
                column += segment.cell_length
        return "".join(written) + _turn(pen, _PLAIN)

    def _pieces(self) -> Iterator[tuple[int, int, list[Segment]]]:
        """(y, x, segments) of what lies in the changed spans, from left to right and from top to
        bottom.
        """
        for y, x1, x2 in self.spans:
            for end, (x, strip) in zip(self.chop_ends[y], self.chops[y].items(), strict=True):
                first, last = max(x, x1), min(end, x2)
                if strip is not None and first < last:
                    yield y, first, list(strip.crop(first - x, last - x))


@lru_cache(maxsize=4096)
def sgr_codes(style: Style, system: ColorSystem) -> _Pen:
    """The SGR codes of a style on a terminal of so many colours."""
    colours = [
        ";".join(colour.downgrade(system).get_ansi_codes(foreground=index == 0))
        if colour is not None
        else ""
        for index, colour in enumerate((style.color, style.bgcolor))
    ]
    return style.without_color._make_ansi_codes(system), colours[0], colours[1]


def _turn(pen: _Pen, wanted: _Pen) -> str:
    """The sequence from one pen to another; attributes are only taken back all together."""
    if pen == wanted:
        return ""
    if pen[0] != wanted[0]:
        return f"\x1b[{';'.join(('0', *filter(None, wanted)))}m" if any(wanted) else "\x1b[0m"
    codes = [
        new or f"{number}"
        for old, new, number in zip(pen[1:], wanted[1:], (39, 49), strict=True)
        if old != new
    ]
    return f"\x1b[{';'.join(codes)}m"
