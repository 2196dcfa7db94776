"""The dialog of the guard's question, and its evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.binding import Binding, BindingType

from guardrail.tui.draw.lines import Builder, Row
from guardrail.tui.model.view import View
from guardrail.tui.screens.choice_dialogs import Choose, Options, Words
from guardrail.tui.screens.pager import Pager


class Evidence(Pager):
    """What led to a question, on top of the question.

    Args:
        left: how long the question stays open; "" where nothing limits it.
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
        if not left:
            return ()
        return ((left, "dim"),)


class Question(Choose):
    """What the guard asks; a key shows the evidence while the question stays open.

    Args:
        evidence: makes the rows of the evidence.
        left: as `Evidence` takes it.
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
        # Only the page got new frames meanwhile, and the question may be answered by now.
        self.app.push_screen(page, lambda _: self.show(page.view))
