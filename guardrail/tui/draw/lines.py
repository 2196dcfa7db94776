"""Rows of toned text, and the widget that draws them and redraws only those that changed.

A row is a tuple of pieces (text, tone). There is no markup anywhere: text is cleaned where it
becomes a strip, the one place that leads to the terminal, so that no log line or file name can send
it a sequence.
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
_MOVE = 4  # cells that are sent again rather than passed over


def make_row(*pieces: Piece | str) -> Row:
    """Pieces; a bare string is plain."""
    return tuple((piece, "plain") if isinstance(piece, str) else piece for piece in pieces if piece)


def text_width(text: str) -> int:
    """Most texts are plain ones, for which there is nothing to look up."""
    return len(text) if text.isascii() and text.isprintable() else cell_len(text)


def row_width(line: Row) -> int:
    return sum([text_width(text) for text, _ in line])


def fit_row(line: Row, width: int) -> Row:
    """The row in at most `width` cells, ending in an ellipsis where it was cut."""
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
    """`left`, and `right` at the right edge; `right` goes where both have no room."""
    room = width - row_width(left) - row_width(right)
    return (*left, (" " * room, "plain"), *right) if right and room >= 2 else fit_row(left, width)


def title_row(name: str, width: int, *, right: Row = (), tone: str = "dim") -> Row:
    """`─ name ─────── right ─`; of `right` goes what a narrow one has no room for, the first pieces
    first.
    """
    left: Row = (("─ ", "faint"), (name, tone), (" ", "plain"))
    while right and row_width(left) + row_width(right) + 4 > width:
        right = right[1:]
    tail: Row = ((" ", "plain"), *right, (" ─", "faint")) if right else (("─", "faint"),)
    room = width - row_width(left) - row_width(tail)
    return (*left, ("─" * room, "faint"), *tail) if room >= 1 else fit_row(left, width)


def wrap_text(text: str, width: int) -> list[str]:
    """Words in lines of at most `width` cells; a longer word is broken."""
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
    """(first cell, cells) of the stretches in which two rows differ; the whole row where cells are
    not characters.

    Stretches with less between them than it takes to move the cursor over it are one.
    """
    cells = [[(char, tone) for text, tone in line for char in text] for line in (before, after)]
    if any(
        len(line) != row_width(drawn) for line, drawn in zip(cells, (before, after), strict=True)
    ):
        return [(0, width)]
    pairs = itertools.zip_longest(*cells, fillvalue=(" ", "plain"))
    found: list[tuple[int, int]] = []
    for x, (a, b) in enumerate(pairs):
        if a == b:
            continue
        if found and x - sum(found[-1]) <= _MOVE:
            found[-1] = found[-1][0], x + 1 - found[-1][0]
        else:
            found.append((x, 1))
    return found


class Lines(Widget):
    """Draws what `build(view, width, height)` says; what did not change is not drawn again.

    Args:
        build: rows for a view and a size.
        reserve: rows of the screen that an automatic height leaves to others.
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
        # as `build` gave them, and `_rows`: as they fit into `_fitted` cells
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
        known = self._built if width == self._fitted else ()
        rows = [
            self._rows[y] if y < len(known) and line == known[y] else fit_row(line, width)
            for y, line in enumerate(built)
        ]
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
        """What `build` says; where it fails, a sentence in its place, and the rest of the screen
        goes on.
        """
        try:
            return self._build(view, width, height)
        except Exception as error:  # a part that cannot be drawn must not end the screen
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
            # The first paint at a size comes before the message that tells of it: it has the text
            # already.
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
