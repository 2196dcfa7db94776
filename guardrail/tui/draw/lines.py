"""Rows of toned text, and the widget that draws them and redraws only what changed.

A row is a tuple of pieces (text, tone), without markup. Text is cleaned where it becomes a strip,
the only way to the terminal. So no log line or file name can send the terminal a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from textual.events import Resize
from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

from guardrail.core.text import clean_text
from guardrail.tui.draw import palette
from guardrail.tui.model.view import View

Piece = tuple[str, str]
Row = tuple[Piece, ...]
Builder = Callable[[View, int, int], Sequence[Row]]
_MOVE = 4  # cells that are sent again: moving the cursor over them costs as much


def make_row(*pieces: Piece | str) -> Row:
    """Return a row of pieces; a bare string is plain, and an empty one is dropped."""
    row: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str):
            if piece:
                row.append((piece, "plain"))
        else:
            row.append(piece)
    return tuple(row)


def text_width(text: str) -> int:
    """Return the cells of a text; for ASCII, which is most of it, that is its length."""
    if text.isascii() and text.isprintable():
        return len(text)
    return cell_len(text)


def row_width(line: Row) -> int:
    return sum([text_width(text) for text, _ in line])


def fit_row(line: Row, width: int) -> Row:
    """Return the row in at most `width` cells, with an ellipsis where it was cut."""
    if row_width(line) <= width:
        return line
    kept: list[Piece] = []
    left = width - 1
    for text, tone in line:
        length = text_width(text)
        if length > left:
            kept.append((set_cell_size(text, max(0, left)).rstrip() + "…", tone))
            break
        kept.append((text, tone))
        left -= length
    return tuple(kept) if width > 0 else ()


def spread_row(left: Row, right: Row, width: int) -> Row:
    """Return `left`, and `right` at the right edge; `right` is dropped where both have no room."""
    room = width - row_width(left) - row_width(right)
    if not right or room < 2:
        return fit_row(left, width)
    return (*left, (" " * room, "plain"), *right)


def title_row(name: str, width: int, *, right: Row = (), tone: str = "dim") -> Row:
    """Return `─ name ─────── right ─`; a narrow title drops the first pieces of `right`."""
    left: Row = (("─ ", "faint"), (name, tone), (" ", "plain"))
    while right and row_width(left) + row_width(right) + 4 > width:
        right = right[1:]
    tail: Row = (("─", "faint"),)
    if right:
        tail = ((" ", "plain"), *right, (" ─", "faint"))
    room = width - row_width(left) - row_width(tail)
    if room < 1:
        return fit_row(left, width)
    return (*left, ("─" * room, "faint"), *tail)


def wrap_text(text: str, width: int) -> list[str]:
    """Return the words in lines of at most `width` cells; a longer word is broken."""
    width = max(1, width)
    lines, line = [], ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if text_width(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while text_width(word) > width:
            head = set_cell_size(word, width).rstrip() or word[0]
            lines.append(head)
            word = word[len(head) :]
        line = word
    return [*lines, line] if line or not lines else lines


def changed_cells(before: Row, after: Row, width: int) -> list[tuple[int, int]]:
    """Return (first cell, cells) of the ranges in which two rows differ.

    Ranges with less between them than it costs to move the cursor are one. Where cells are not
    characters, as in wide text, the complete row is one range.
    """
    chars = [_toned_chars(line) for line in (before, after)]
    if len(chars[0]) != row_width(before) or len(chars[1]) != row_width(after):
        return [(0, width)]
    pairs = itertools.zip_longest(*chars, fillvalue=(" ", "plain"))
    found: list[tuple[int, int]] = []
    for x, (a, b) in enumerate(pairs):
        if a == b:
            continue
        if found and x - sum(found[-1]) <= _MOVE:
            found[-1] = found[-1][0], x + 1 - found[-1][0]
        else:
            found.append((x, 1))
    return found


def _toned_chars(line: Row) -> list[tuple[str, str]]:
    """Return (character, tone) of each character."""
    return [(char, tone) for text, tone in line for char in text]


class Lines(Widget):
    """Draws the rows of `build(view, width, height)`; rows that did not change are not drawn again.

    Args:
        build: rows for a view and a size.
        reserve: rows of the screen that an automatic height does not take.
        view: what the first frame shows, so that it is not empty.
    """

    DEFAULT_CSS = "Lines { height: 1fr; width: 1fr; }"

    def __init__(
        self,
        build: Builder,
        *,
        id: str | None = None,
        classes: str | None = None,
        reserve: int = 0,
        view: View | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._build, self._reserve = build, reserve
        self._view = view
        self._size_built = Size(0, 0)
        # rows of `build`, and in `_rows` cut to `_fitted` cells
        self._built: list[Row] = []
        self._rows: list[Row] = []
        self._fitted = 0
        self._strips: dict[int, Strip] = {}
        self._theme = ""

    @property
    def rows(self) -> Sequence[Row]:
        return self._rows

    def show(self, view: View) -> None:
        self._view = view
        self.redraw()

    def redraw(self) -> None:
        """Build again and refresh what differs."""
        width, height = self.size
        if self._view is None or not width or not height or not self.display:
            return
        built = list(self._built_rows(self._view, width, height)[:height])
        # Measuring text is most of the work of a frame in which little happens.
        known = self._built if width == self._fitted else []
        rows: list[Row] = []
        for y, line in enumerate(built):
            same = y < len(known) and line == known[y]
            rows.append(self._rows[y] if same else fit_row(line, width))
        self._built, self._fitted, self._size_built = built, width, self.size
        regions: list[Region] = []
        for y in range(max(len(rows), len(self._rows))):
            before = self._rows[y] if y < len(self._rows) else ()
            after = rows[y] if y < len(rows) else ()
            if before != after:
                self._strips.pop(y, None)
                regions += [
                    Region(x, y, cells, 1) for x, cells in changed_cells(before, after, width)
                ]
        self._rows = rows
        if regions:
            self.refresh(*regions)

    def _built_rows(self, view: View, width: int, height: int) -> Sequence[Row]:
        """Return the rows of `build`; a sentence where it fails: the rest of the screen works."""
        try:
            return self._build(view, width, height)
        except Exception as error:  # every kind: one part must not end the screen
            text = f" ✗ this part cannot be drawn: {type(error).__name__}: {clean_text(str(error), 200)}"
            return [fit_row(((text, "bad"),), width)]

    def on_resize(self, event: Resize) -> None:
        self._strips.clear()
        self.redraw()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        if self._view is None:
            return 1
        room = max(1, viewport.height - self._reserve)
        return min(room, max(1, len(self._built_rows(self._view, width, room))))

    def render_line(self, y: int) -> Strip:
        if self._view is not None and self.size != self._size_built:
            # The first paint at a size comes before the resize message, and must have the text.
            width, height = self._size_built = self.size
            self._rows = [
                fit_row(line, width)
                for line in self._built_rows(self._view, width, height)[:height]
            ]
            self._built, self._fitted = [], 0
            self._strips.clear()
        if self._theme != self.app.theme:
            self._strips.clear()
            self._theme = self.app.theme
        strip = self._strips.get(y)
        if strip is None:
            strip = self._strips[y] = self._strip(self._rows[y] if y < len(self._rows) else ())
        return strip

    def _strip(self, line: Row) -> Strip:
        styles = palette.theme_styles(self.app.theme)
        base = self.rich_style
        cleaned = fit_row(tuple((clean_text(text), tone) for text, tone in line), self.size.width)
        segments = [Segment(text, base + styles[tone]) for text, tone in cleaned if text]
        return Strip(segments).adjust_cell_length(self.size.width, base)
