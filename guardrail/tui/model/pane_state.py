"""What a viewer chose in one pane. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaneState:
    """The choices of a viewer in one pane.

    Attributes:
        cursor: the entry that is selected; None: none is.
        filter: only entries that contain this text are shown, capital or not; "" shows all.
        focused: keys go to this pane.
    """

    cursor: int | None = None
    filter: str = ""
    focused: bool = False

    def shows(self, text: str) -> bool:
        return self.filter.casefold() in text.casefold()
