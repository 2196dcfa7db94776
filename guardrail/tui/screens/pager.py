"""A dialog of rows to scroll through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType

from guardrail.tui.draw.lines import Builder, Row, fit_row
from guardrail.tui.model.view import View
from guardrail.tui.screens.dialog import Dialog, always, clamp_scroll

_LAST = 1_000_000  # further than any list is long


class Pager(Dialog[None]):
    """Rows to scroll through.

    Args:
        build: makes the rows.
        tail: the end stays in sight until the viewer scrolls.
    """

    WIDTH = 120
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll(-1)", "up", show=False),
        Binding("down,j", "scroll(1)", "down", show=False),
        Binding("pageup", "scroll(-20)", "page up", show=False),
        Binding("pagedown,space", "scroll(20)", "page down", show=False),
        Binding("home", f"scroll({-_LAST})", "first", show=False),
        Binding("end", f"scroll({_LAST})", "last", show=False),
        Binding("question_mark,enter", "close", "close", show=False),
    ]

    def __init__(
        self,
        name: str,
        view: View,
        build: Builder,
        *,
        tail: bool = False,
        alive: Callable[[View], bool] = always,
    ) -> None:
        super().__init__(name, view, alive=alive)
        self._content, self._top, self._tail = build, 0, tail
        self._rest = ""

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        rows = self._content(view, width, height)
        if self._tail:
            self._top = _LAST
        self._top = clamp_scroll(self._top, len(rows), height)
        self._rest = ""
        if len(rows) > height:
            self._rest = f"{self._top + 1}–{self._top + height} of {len(rows)}"
        return [fit_row(line, width) for line in rows[self._top : self._top + height]]

    def corner(self) -> Row:
        """Return which rows are in sight, where not all of them are."""
        if not self._rest:
            return ()
        return ((self._rest, "dim"),)

    def hint(self) -> str:
        return "↑ ↓ scroll   Esc close"

    def scroll_by(self, by: int) -> None:
        self.action_scroll(3 * by)

    def action_scroll(self, by: int) -> None:
        self._top = max(0, self._top + by)
        self._tail = by >= _LAST
        self.show(self.view)
