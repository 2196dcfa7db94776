"""Windows over the screen. Each closes with a result, or with None when nothing is to be done; none
sends anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import Click, Key, MouseScrollDown, MouseScrollUp
from textual.screen import ModalScreen
from textual.widgets import Input

from guardrail.tui.draw.lines import (
    Builder,
    Lines,
    Row,
    fit_row,
    make_row,
    spread_row,
    title_row,
    wrap_text,
)
from guardrail.tui.model.view import View
from guardrail.tui.terminal.key_queue import LATER, NEVER, NOW

T = TypeVar("T")
Options = Sequence[tuple[str | Row, str]] | Callable[[View], Sequence[tuple[str | Row, str]]]
Words = Sequence[str] | Callable[[View], Sequence[str]]  # a text, or what makes it of the view
_FRAME = 3  # rows of border and hint
_OPTIONS = 6  # options that are always in sight
_TRIES = 20  # frames after which a dialog counts as drawn
SETTLED_SECONDS = 1.0  # after which a dialog that opened by itself takes Enter
_AIRY = 18  # rows of the terminal from which on a dialog is set with blank rows


def _cut(rows: Sequence[Row], count: int, width: int) -> list[Row]:
    """The first rows; where there are more, the last of them ends with a sign of it."""
    kept = list(rows[: max(0, count)])
    if kept and len(rows) > len(kept):
        kept[-1] = (*fit_row(kept[-1], width - 2), (" …", "dim"))
    return kept


class Dialog(ModalScreen[T]):
    """A framed window of at most `WIDTH` cells, with rows that are built anew for every frame.

    Args:
        alive: closes the dialog by itself once it says False (somebody else has answered).

    Attributes:
        lapsed: it has closed by itself.
        by_itself: no key of the viewer has opened it.
        drawn: when its text stood on the screen, by the clock of key events; None: it does not yet.
    """

    WIDTH = 84
    EXTRA = 0
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "close", "close", show=False)]

    def __init__(
        self, name: str, view: View, *, alive: Callable[[View], bool] = lambda view: True
    ) -> None:
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
        """Widgets between rows and hint, of EXTRA rows together."""
        yield from ()

    def on_mount(self) -> None:
        self.query_one(".dialog").styles.max_width = self.WIDTH
        self.show(self.view)
        self.call_after_refresh(self._note_drawn, _TRIES)

    def _note_drawn(self, tries: int) -> None:
        # A terminal without a row for it never draws it, and its keys work all the same.
        if not tries or any(body.rows for body in self.query(".body").results(Lines)):
            self.drawn = time.monotonic()
        elif self.is_running:
            self.call_after_refresh(self._note_drawn, tries - 1)

    def stands(self) -> bool:
        """Whether all that must be read before an answer is there."""
        return True

    def takes(self, key: Key) -> str:
        """What is done with a key: NOW, LATER, or NEVER where it was meant for something else."""
        if self.drawn is None:
            return LATER
        if self.by_itself:
            early = key.time < self.drawn or (
                key.key == "enter" and key.time < self.drawn + SETTLED_SECONDS
            )
            return NEVER if early else NOW
        if self.stands():
            return NOW
        return LATER if key.time < self.drawn or self.agrees(key) else NOW

    def agrees(self, key: Key) -> bool:
        """Whether a key agrees to what the text says, so that it waits until the text says all of
        it.
        """
        return False

    def show(self, view: View) -> None:
        self.view = view
        if not self.alive(view):
            self.lapsed = True
            self.dismiss(None)
            return
        for lines in self.query(Lines):
            lines.show(view)
        # A frame may come before the dialog has its widgets: then there is nothing to lay out yet.
        for body in self.query(".body"):
            body.refresh(layout=True)

    def _rows(self, view: View, width: int, height: int) -> Sequence[Row]:
        air: list[Row] = [()] * self._airy
        room = height - 1 - 2 * len(air)
        body = _cut(self.body(view, width, room), room, width)
        return [title_row(self.label, width, right=self.corner(), tone="strong"), *air, *body, *air]

    @property
    def _airy(self) -> bool:
        """A low terminal has no blank rows to give."""
        return self.app.size.height >= _AIRY

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        raise NotImplementedError

    def corner(self) -> Row:
        """What stands at the right of the title, of the body that was built last."""
        return ()

    def hint(self) -> str:
        return "Esc close"

    def aside(self) -> Row:
        """What stands at the right of the hint where it has room."""
        return ()

    def _last(self, view: View, width: int, height: int) -> Sequence[Row]:
        return [spread_row(make_row((f" {self.hint()}", "dim")), self.aside(), width)]

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self.turn(-1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self.turn(1)

    def turn(self, by: int) -> None:
        """The mouse wheel."""

    def action_close(self) -> None:
        self.dismiss(None)


class Choose(Dialog[int]):
    """A text and a list to choose from; the result is the index.

    Args:
        text: said above the list; a function of the view where it changes.
        options: (label, explanation of the marked one); a function of the view where they change.
            Without any, nothing can be chosen.
        cursor: what is marked first.
    """

    EMPTY = "(nothing like that)"
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
        alive: Callable[[View], bool] = lambda view: True,
    ) -> None:
        super().__init__(name, view, alive=alive)
        self._text, self.cursor = text, cursor
        self._options_of = options if callable(options) else None
        self.options: Sequence[tuple[str | Row, str]] = (
            options(view) if callable(options) else options
        )
        self._first_option = 0  # row of the first option that is shown
        self._offset = 0

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        if self._options_of is not None:
            self.options = self._options_of(view)
        # The options come first: of the text goes what a low terminal has no room for.
        explained = any(why for _, why in self.options)
        why = wrap_text(self.options[self.cursor][1], width - 6) if explained else []
        tail: list[Row] = [(), *(make_row((f"   {line}", "dim")) for line in why)] if why else []
        told = self._text(view) if callable(self._text) else self._text
        lines = [line for text in told for line in wrap_text(text, width - 2)]
        spare = max(0, height - len(tail) - min(len(self.options), _OPTIONS) - 1)
        rows: list[Row] = _cut([make_row(f" {line}") for line in lines], spare, width)
        while rows and not rows[-1][0][0].strip():
            rows.pop()
        rows += [()] if rows else []
        self._first_option = 1 + self._airy + len(rows)
        room = max(1, height - len(rows) - len(tail))
        if not self.options:
            rows.append(make_row((f"   {self.EMPTY}", "dim")))
        self._offset = max(0, min(self.cursor - room // 2, len(self.options) - room))
        for index in range(self._offset, min(len(self.options), self._offset + room)):
            label = self.options[index][0]
            marked = index == self.cursor
            pieces = (
                ((label, "strong" if marked else "plain"),) if isinstance(label, str) else label
            )
            rows.append(fit_row(((" ▸ " if marked else "   ", "key"), *pieces), width))
        return [*rows, *tail]

    def hint(self) -> str:
        return "↑ ↓ move   Enter choose   Esc close"

    def turn(self, by: int) -> None:
        self.action_move(by)

    def action_move(self, by: int) -> None:
        self.cursor = max(0, min(len(self.options) - 1, self.cursor + by)) if self.options else 0
        self.show(self.view)

    def action_take(self) -> None:
        if self.options and (self.stands() or not self.cursor_matters()):
            self.dismiss(self.cursor)

    def cursor_matters(self) -> bool:
        """Whether what is marked may be taken only once all of the text stands."""
        return True

    def on_click(self, event: Click) -> None:
        """A click marks; what is done is left to Enter."""
        body = self.query_one(".body", Lines)
        index = event.screen_y - body.region.y - self._first_option + self._offset
        if body.region.contains(event.screen_x, event.screen_y) and 0 <= index < len(self.options):
            self.cursor = index
            self.show(self.view)


class Toggle(Choose):
    """A list of what is on and off; Enter changes the marked one at once, Esc closes.

    Args:
        options: rows of the list as they are now.
        toggle: changes one.
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
    """A question whose default is No; the result is 1 for Yes, which is taken only when its text
    stands.

    Args:
        ready: whether the text says all that it has to say.
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
        ready: Callable[[View], bool] = lambda view: True,
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


class Number(Dialog[float]):
    """Asks for a number; what `parse` does not like is said and asked again."""

    EXTRA = 2
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "close", show=False, priority=True)
    ]

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Sequence[str],
        default: str,
        parse: Callable[[str], float | str],
    ) -> None:
        super().__init__(name, view)
        self.text, self._default, self._parse = text, default, parse
        self._wrong = ""

    def extras(self) -> ComposeResult:
        yield Input(self._default, id="number", select_on_focus=True, compact=True)

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        rows: list[Row] = [
            make_row(f" {line}") for text in self.text for line in wrap_text(text, width - 2)
        ]
        return [*rows, make_row((f" ✗ {self._wrong}", "bad"))] if self._wrong else rows

    def hint(self) -> str:
        return "Enter send   Esc close"

    def on_input_submitted(self, event: Input.Submitted) -> None:
        value = self._parse(event.value)
        if isinstance(value, str):
            self._wrong = value
            self.show(self.view)
        else:
            self.dismiss(value)


class Text(Dialog[str]):
    """Asks for a line of text."""

    EXTRA = 2
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "close", show=False, priority=True)
    ]

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Sequence[str],
        default: str = "",
        hint: str = "Enter send   Esc close",
    ) -> None:
        super().__init__(name, view)
        self._text, self._default, self._hint = text, default, hint

    def extras(self) -> ComposeResult:
        yield Input(
            self._default,
            id="text",
            classes="long",
            select_on_focus=True,
            compact=True,
            max_length=400,
        )

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        return [make_row(f" {line}") for text in self._text for line in wrap_text(text, width - 2)]

    def hint(self) -> str:
        return self._hint

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)


class Palette(Choose):
    """A list that narrows as one types; the result is the index in the whole list."""

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
        self._found = [
            i for i, (label, _) in enumerate(self._all) if all(w in _plain(label) for w in words)
        ]
        self.options, self.cursor = [self._all[i] for i in self._found], 0
        self.show(self.view)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.action_take()

    def action_take(self) -> None:
        if self._found:
            self.dismiss(self._found[self.cursor])

    def hint(self) -> str:
        return "type to narrow   ↑ ↓ move   Enter do it   Esc close"


def _plain(label: str | Row) -> str:
    return (label if isinstance(label, str) else "".join(text for text, _ in label)).casefold()


class Pager(Dialog[None]):
    """Rows to scroll through; `tail` keeps the end in sight until somebody scrolls."""

    WIDTH = 120
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll(-1)", "up", show=False),
        Binding("down,j", "scroll(1)", "down", show=False),
        Binding("pageup", "scroll(-20)", "page up", show=False),
        Binding("pagedown,space", "scroll(20)", "page down", show=False),
        Binding("home", "scroll(-1000000)", "first", show=False),
        Binding("end", "scroll(1000000)", "last", show=False),
        Binding("question_mark,enter", "close", "close", show=False),
    ]

    def __init__(
        self,
        name: str,
        view: View,
        build: Builder,
        *,
        tail: bool = False,
        alive: Callable[[View], bool] = lambda view: True,
    ) -> None:
        super().__init__(name, view, alive=alive)
        self._content, self._top, self._tail = build, 0, tail
        self._rest = ""

    def body(self, view: View, width: int, height: int) -> Sequence[Row]:
        rows = self._content(view, width, height)
        last = max(0, len(rows) - height)
        self._top = last if self._tail else max(0, min(self._top, last))
        self._rest = f"{self._top + 1}–{self._top + height} of {len(rows)}" if last else ""
        return [fit_row(line, width) for line in rows[self._top : self._top + height]]

    def corner(self) -> Row:
        """Which rows are in sight, where not all of them are."""
        return ((self._rest, "dim"),) if self._rest else ()

    def hint(self) -> str:
        return "↑ ↓ scroll   Esc close"

    def turn(self, by: int) -> None:
        self.action_scroll(3 * by)

    def action_scroll(self, by: int) -> None:
        self._top = max(0, self._top + by)
        self._tail = by > 100_000
        self.show(self.view)


class Evidence(Pager):
    """What led to a question, over the question.

    Args:
        left: how long the question still stands, "" where nothing limits it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("v", "close", "back", show=False)]

    def __init__(
        self,
        name: str,
        view: View,
        build: Builder,
        *,
        alive: Callable[[View], bool],
        left: Callable[[View], str],
    ) -> None:
        super().__init__(name, view, build, alive=alive)
        self._left = left

    def hint(self) -> str:
        return "↑ ↓ scroll   v back"

    def aside(self) -> Row:
        left = self._left(self.view)
        return ((left, "dim"),) if left else ()


class Question(Choose):
    """What the guard asks; a key shows the evidence while the question stands.

    Args:
        evidence: rows of it.
        left: as of `Evidence`.
    """

    EMPTY = "(the choices and their costs are not in the journal yet …)"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("v", "evidence", "evidence", show=False)]

    def __init__(
        self,
        name: str,
        view: View,
        *,
        text: Words,
        options: Options,
        alive: Callable[[View], bool],
        evidence: Builder,
        left: Callable[[View], str],
    ) -> None:
        super().__init__(name, view, text=text, options=options, alive=alive)
        self._evidence, self._left = evidence, left

    def hint(self) -> str:
        return "↑ ↓ move   Enter choose   v evidence   Esc close"

    def stands(self) -> bool:
        return bool(self.options)

    def action_evidence(self) -> None:
        page = Evidence("evidence", self.view, self._evidence, alive=self.alive, left=self._left)
        # Meanwhile only the page has seen new frames, and the question may be answered by now.
        self.app.push_screen(page, lambda _: self.show(page.view))
