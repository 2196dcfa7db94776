"""What a viewer chose in one pane. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaneState:
    """One pane as this viewer looks at it.

    Attributes:
        cursor: the entry that is marked; None: none is, and a pane that grows at its end shows its
        end.
        filter: only entries with this text in them are shown, in any case of letters; "" shows all.
        focused: keys go to this pane.
    """

    cursor: int | None = None
    filter: str = ""
    focused: bool = False

    def shows(self, text: str) -> bool:
        return self.filter.casefold() in text.casefold()
