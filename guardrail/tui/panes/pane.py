"""What a pane is. Each pane is one file with a `PANE`, and one line in `table.PANES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from guardrail.tui.draw.lines import Row
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Pane(Generic[Entry]):
    """One pane. All functions are pure.

    Attributes:
        name: one word.
        about: what it shows, for the help.
        entries: (view, state) -> entries that can be selected, in their order, filter applied.
        build: (view, width, height, state) -> at most `height` rows, the title first.
        describe: (view, entry, width) -> rows of the window that Enter opens; None: it opens none.
        step_of: entry -> its step, to which Enter moves the cursor of the charts; None: entries
            have no step.
        tail: it grows at its end, and shows its end while no entry is selected.
        number: the digit that focuses it; set by the table.
    """

    name: str
    about: str
    entries: Callable[[View, PaneState], Sequence[Entry]]
    build: Callable[[View, int, int, PaneState], Sequence[Row]]
    describe: Callable[[View, Entry, int], Sequence[Row]] | None = None
    step_of: Callable[[Entry], int] | None = None
    tail: bool = False
    number: str = ""

    def count(self, view: View, state: PaneState) -> int:
        return len(self.entries(view, state))

    def selected(self, view: View, state: PaneState) -> Entry | None:
        """Return the entry under the cursor; None where no entry is selected."""
        if state.cursor is None:
            return None
        entries = self.entries(view, state)
        if state.cursor >= len(entries):
            return None
        return entries[state.cursor]

    def step(self, view: View, state: PaneState) -> int | None:
        """Return the step of the selected entry."""
        entry = self.selected(view, state)
        if self.step_of is None or entry is None:
            return None
        return self.step_of(entry)

    def detail(self, view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
        """Return the rows of the window that Enter opens; none where it opens none."""
        entry = self.selected(view, state)
        if self.describe is None or entry is None:
            return []
        return self.describe(view, entry, width)
