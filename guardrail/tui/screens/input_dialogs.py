"""Dialogs with a field to type in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input

from guardrail.tui.draw.lines import Row, make_row, wrap_text
from guardrail.tui.model.view import View
from guardrail.tui.screens.dialog import Dialog

T = TypeVar("T")
MAX_LENGTH = 400  # characters of a text


class InputDialog(Dialog[T]):
    """A text and a field of one line.

    Args:
        text: above the field.
        default: in the field, selected, so that typing replaces it.
    """

    EXTRA = 2
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "close", show=False, priority=True)
    ]

    def __init__(self, name: str, view: View, *, text: Sequence[str], default: str) -> None:
        super().__init__(name, view)
        self.text, self._default = text, default

    def make_input(self, **options: Any) -> Input:
        """Return the field; `options` as `Input` takes them."""
        return Input(self._default, select_on_focus=True, compact=True, **options)

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        return [make_row(f" {line}") for text in self.text for line in wrap_text(text, width - 2)]

    def hint(self) -> str:
        return "Enter send   Esc close"


class Number(InputDialog[float]):
    """Asks for a number, again until `parse` accepts it.

    Args:
        parse: returns the number, or what is wrong with the text.
    """

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Sequence[str],
        default: str,
        parse: Callable[[str], float | str],
    ) -> None:
        super().__init__(name, view, text=text, default=default)
        self._parse = parse
        self._wrong = ""

    def extras(self) -> ComposeResult:
        yield self.make_input(id="number")

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        rows = super().body(view, width, height)
        if self._wrong:
            rows = [*rows, make_row((f" ✗ {self._wrong}", "bad"))]
        return rows

    def on_input_submitted(self, event: Input.Submitted) -> None:
        value = self._parse(event.value)
        if isinstance(value, str):
            self._wrong = value
            self.show(self.view)
        else:
            self.dismiss(value)


class Text(InputDialog[str]):
    """Asks for a line of text.

    Args:
        hint: the keys.
    """

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Sequence[str],
        default: str = "",
        hint: str = "Enter send   Esc close",
    ) -> None:
        super().__init__(name, view, text=text, default=default)
        self._hint = hint

    def extras(self) -> ComposeResult:
        yield self.make_input(id="text", classes="long", max_length=MAX_LENGTH)

    def hint(self) -> str:
        return self._hint

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)
