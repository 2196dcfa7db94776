"""Dialogs with a list to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Click, Key
from textual.widgets import Input

from guardrail.tui.draw.lines import Lines, Row, fit_row, make_row, wrap_text
from guardrail.tui.model.view import View
from guardrail.tui.screens.dialog import Dialog, always, clamp_scroll, cut_rows

Options = Sequence[tuple[str | Row, str]] | Callable[[View], Sequence[tuple[str | Row, str]]]
Words = Sequence[str] | Callable[[View], Sequence[str]]  # a text, or what makes it of the view
_OPTIONS = 6  # options that are always in sight


class Choose(Dialog[int]):
    """A text and a list to choose from; the result is the index.

    Args:
        text: above the list; a function of the view where it changes.
        options: (label, explanation that is shown while it is marked); a function of the view where
            they change. Without any, nothing can be chosen.
        cursor: the option that is marked first.
    """

    EMPTY = "(no such entry)"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False),
        Binding("down,j", "move(1)", "down", show=False),
        Binding("home", "move(-9999)", "first", show=False),
        Binding("end", "move(9999)", "last", show=False),
        Binding("enter", "take", "choose", show=False),
    ]

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Words,
        options: Options,
        cursor: int = 0,
        alive: Callable[[View], bool] = always,
    ) -> None:
        super().__init__(name, view, alive=alive)
        self._text, self.cursor = text, cursor
        self._options_of: Callable[[View], Sequence[tuple[str | Row, str]]] | None = None
        self.options: Sequence[tuple[str | Row, str]] = ()
        if callable(options):
            self._options_of = options
            self.options = options(view)
        else:
            self.options = options
        self._first_option = 0  # row of the first option that is shown
        self._offset = 0

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        if self._options_of is not None:
            self.options = self._options_of(view)
        explanation = self._explanation(width)
        # The options come first. A low terminal has no room for the end of the text.
        shown = min(len(self.options), _OPTIONS)
        rows = self._text_rows(view, width, height - len(explanation) - shown - 1)
        self._first_option = 1 + self._airy + len(rows)
        room = max(1, height - len(rows) - len(explanation))
        self._offset = clamp_scroll(self.cursor - room // 2, len(self.options), room)
        if not self.options:
            rows.append(make_row((f"   {self.EMPTY}", "dim")))
        end = min(len(self.options), self._offset + room)
        options = [self._option_row(index, width) for index in range(self._offset, end)]
        return [*rows, *options, *explanation]

    def _explanation(self, width: int) -> list[Row]:
        """Return a blank row and the explanation of the marked option; [] where none has one."""
        if not any(explanation for _, explanation in self.options):
            return []
        lines = wrap_text(self.options[self.cursor][1], width - 6)
        if not lines:
            return []
        return [(), *(make_row((f"   {line}", "dim")) for line in lines)]

    def _text_rows(self, view: View, width: int, room: int) -> list[Row]:
        """Return the text in at most `room` rows, and a blank row after it."""
        text = self._text
        if callable(text):
            text = text(view)
        lines = [
            make_row(f" {line}") for paragraph in text for line in wrap_text(paragraph, width - 2)
        ]
        rows = cut_rows(lines, max(0, room), width)
        while rows and not rows[-1][0][0].strip():
            rows.pop()
        if rows:
            rows.append(())
        return rows

    def _option_row(self, index: int, width: int) -> Row:
        label = self.options[index][0]
        mark, tone = "   ", "plain"
        if index == self.cursor:
            mark, tone = " ▸ ", "strong"
        if isinstance(label, str):
            label = ((label, tone),)
        return fit_row(((mark, "key"), *label), width)

    def hint(self) -> str:
        return "↑ ↓ move   Enter choose   Esc close"

    def scroll_by(self, by: int) -> None:
        self.action_move(by)

    def action_move(self, by: int) -> None:
        self.cursor = max(0, min(len(self.options) - 1, self.cursor + by))
        self.show(self.view)

    def action_take(self) -> None:
        if self.options and (self.stands() or not self.cursor_matters()):
            self.dismiss(self.cursor)

    def cursor_matters(self) -> bool:
        """Return whether the marked option may be taken only once the text is complete."""
        return True

    def on_click(self, event: Click) -> None:
        """Mark the option under a click. Only Enter takes it."""
        body = self.query_one(".body", Lines)
        index = event.screen_y - body.region.y - self._first_option + self._offset
        if body.region.contains(event.screen_x, event.screen_y) and 0 <= index < len(self.options):
            self.cursor = index
            self.show(self.view)


class Toggle(Choose):
    """A list of what is on and off; Enter switches the marked one at once, Esc closes.

    Args:
        options: returns the rows of the list as they are now.
        toggle: switches one.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("space", "take", "change", show=False)]

    def __init__(
        self,
        name: str,
        view: View,
        *,
        options: Callable[[], Sequence[tuple[Row, str]]],
        toggle: Callable[[int], None],
    ) -> None:
        super().__init__(name, view, text=[], options=options())
        self._now, self._toggle = options, toggle

    def hint(self) -> str:
        return "↑ ↓ move   Enter show or hide   Esc close"

    def action_take(self) -> None:
        self._toggle(self.cursor)
        self.options = self._now()
        self.show(self.view)


class Confirm(Choose):
    """A question whose default is No; the result is 1 for Yes.

    Yes is taken only once the text is complete.

    Args:
        ready: whether the text is complete.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(1)", "yes", show=False),
        Binding("n", "answer(0)", "no", show=False),
    ]

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Words,
        yes: str,
        ready: Callable[[View], bool] = always,
    ) -> None:
        super().__init__(name, view, text=text, options=[("No, go back", ""), (f"Yes, {yes}", "")])
        self._ready = ready

    def hint(self) -> str:
        return "↑ ↓ move   Enter choose   y yes   n no   Esc close"

    def stands(self) -> bool:
        return self.drawn is not None and self._ready(self.view)

    def cursor_matters(self) -> bool:
        return self.cursor == 1

    def agrees(self, key: Key) -> bool:
        return key.key == "y" or (key.key == "enter" and self.cursor_matters())

    def action_answer(self, answer: int) -> None:
        if not answer or self.stands():
            self.dismiss(answer)


class Palette(Choose):
    """A list that narrows while you type; the result is the index in the full list."""

    EXTRA = 2
    WIDTH = 110
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+p", "close", "close", show=False, priority=True)
    ]

    def __init__(self, name: str, view: View, *, options: Sequence[tuple[str | Row, str]]) -> None:
        super().__init__(name, view, text=[], options=options)
        self._all, self._found = options, list(range(len(options)))

    def extras(self) -> ComposeResult:
        yield Input("", id="search", classes="long", placeholder="words of a command", compact=True)

    def on_input_changed(self, event: Input.Changed) -> None:
        words = event.value.casefold().split()
        labels = [_plain_text(label) for label, _ in self._all]
        self._found = [at for at, label in enumerate(labels) if _has_all(label, words)]
        self.options, self.cursor = [self._all[at] for at in self._found], 0
        self.show(self.view)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.action_take()

    def action_take(self) -> None:
        if self._found:
            self.dismiss(self._found[self.cursor])

    def hint(self) -> str:
        return "type to narrow   ↑ ↓ move   Enter do it   Esc close"


def _has_all(text: str, words: Sequence[str]) -> bool:
    return all(word in text for word in words)


def _plain_text(label: str | Row) -> str:
    if isinstance(label, str):
        return label.casefold()
    return "".join(text for text, _ in label).casefold()
