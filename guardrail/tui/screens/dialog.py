"""The window that all dialogs are: a frame, rows that are built for each frame, and a hint.

A dialog closes with a result, or with None when nothing is to be done. None sends anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import Key, MouseScrollDown, MouseScrollUp
from textual.screen import ModalScreen

from guardrail.tui.draw.lines import Lines, Row, fit_row, make_row, spread_row, title_row
from guardrail.tui.model.view import View
from guardrail.tui.terminal.key_queue import LATER, NEVER, NOW

T = TypeVar("T")
_FRAME = 3  # rows of border and hint
_TRIES = 20  # frames after which a dialog counts as drawn
SETTLED_SECONDS = 1.0  # after which a dialog that opened by itself takes Enter
_AIRY = 18  # rows of the terminal from which on a dialog has blank rows


def always(view: View) -> bool:
    """Return True: the dialog stays open, or its text is complete."""
    return True


def cut_rows(rows: Sequence[Row], count: int, width: int) -> list[Row]:
    """Return the first `count` rows; where there are more, the last one ends with "…"."""
    kept = list(rows[: max(0, count)])
    if kept and len(rows) > len(kept):
        kept[-1] = (*fit_row(kept[-1], width - 2), (" …", "dim"))
    return kept


def clamp_scroll(first: int, total: int, room: int) -> int:
    """Return the index of the first row that is shown.

    Args:
        first: the index that is wanted.
        total: rows in all.
        room: rows that fit.
    """
    return max(0, min(first, total - room))


class Dialog(ModalScreen[T]):
    """A framed window of at most `WIDTH` cells. Its rows are built for every frame.

    Args:
        alive: the dialog closes by itself once this returns False (another user has answered).

    Attributes:
        lapsed: it has closed by itself.
        by_itself: it opened without a key of the viewer.
        drawn: when its text was on the screen, by the clock of key events; None: not yet.
    """

    WIDTH = 84
    EXTRA = 0
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "close", "close", show=False)]

    def __init__(self, name: str, view: View, *, alive: Callable[[View], bool] = always) -> None:
        super().__init__()
        self.label, self.view, self.alive = name, view, alive
        self.by_itself = self.lapsed = False
        self.drawn: float | None = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Lines(self._rows, classes="body", reserve=_FRAME + self.EXTRA, view=self.view)
            yield from self.extras()
            yield Lines(self._last, classes="hint", view=self.view)

    def extras(self) -> ComposeResult:
        """Return the widgets between rows and hint; together they have EXTRA rows."""
        yield from ()

    def on_mount(self) -> None:
        self.query_one(".dialog").styles.max_width = self.WIDTH
        self.show(self.view)
        self.call_after_refresh(self._note_drawn, _TRIES)

    def _note_drawn(self, tries: int) -> None:
        # A terminal without a row for the dialog never draws it. Its keys work all the same.
        if not tries or any(body.rows for body in self.query(".body").results(Lines)):
            self.drawn = time.monotonic()
        elif self.is_running:
            self.call_after_refresh(self._note_drawn, tries - 1)

    def stands(self) -> bool:
        """Return whether all that must be read before an answer is on the screen."""
        return True

    def takes(self, key: Key) -> str:
        """Return when a key is handled: NOW, LATER, or NEVER where it was meant for another screen."""
        if self.drawn is None:
            return LATER
        is_early = key.time < self.drawn
        if self.by_itself:
            if is_early or (key.key == "enter" and key.time < self.drawn + SETTLED_SECONDS):
                return NEVER
            return NOW
        if not self.stands() and (is_early or self.agrees(key)):
            return LATER
        return NOW

    def agrees(self, key: Key) -> bool:
        """Return whether a key agrees to the text, so that it waits until the text is complete."""
        return False

    def show(self, view: View) -> None:
        """Draw a new view, or close where the dialog has no use any more."""
        self.view = view
        if not self.alive(view):
            self.lapsed = True
            self.dismiss(None)
            return
        for lines in self.query(Lines):
            lines.show(view)
        # The first frame may come before the dialog has its widgets.
        for body in self.query(".body"):
            body.refresh(layout=True)

    def _rows(self, view: View, width: int, height: int) -> Sequence[Row]:
        air: list[Row] = [()] * self._airy
        room = height - 1 - 2 * len(air)
        body = cut_rows(self.body(view, width, room), room, width)
        return [title_row(self.label, width, right=self.corner(), tone="strong"), *air, *body, *air]

    @property
    def _airy(self) -> bool:
        """Whether the terminal is high enough for blank rows."""
        return self.app.size.height >= _AIRY

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        """Return the rows between title and hint."""
        raise NotImplementedError

    def corner(self) -> Row:
        """Return what is at the right of the title; `body` was built before."""
        return ()

    def hint(self) -> str:
        """Return the last line: the keys."""
        return "Esc close"

    def aside(self) -> Row:
        """Return what is at the right of the hint where there is room."""
        return ()

    def _last(self, view: View, width: int, height: int) -> Sequence[Row]:
        return [spread_row(make_row((f" {self.hint()}", "dim")), self.aside(), width)]

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self.scroll_by(-1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self.scroll_by(1)

    def scroll_by(self, by: int) -> None:
        """Scroll by so many turns of the mouse wheel."""

    def action_close(self) -> None:
        self.dismiss(None)
