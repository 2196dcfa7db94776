"""What the parts of the dashboard share. Each part is a mixin with the keys of one subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardrail.tui.model.sent_commands import SentCommands
from guardrail.tui.model.view import View

if TYPE_CHECKING:
    from textual.screen import Screen

    Base = Screen[None]
else:
    Base = object


class ScreenPart(Base):
    """One part of the dashboard.

    Attributes:
        view: what the screen shows now.
        commands: of this viewer.
    """

    view: View
    commands: SentCommands

    def change_view(self, **changes: object) -> None:
        """Replace fields of the view that the viewer chooses, and draw it."""
        raise NotImplementedError

    def say(self, text: str, tone: str = "warn") -> None:
        """Show a text in the message line."""
        raise NotImplementedError
