"""Old import: the names of commands as versions before 0.3 gave them out.

Use the names, or the classes in `registry.COMMANDS`. New commands are not listed here.
"""

from __future__ import annotations

from enum import Enum

from guardrail.decide.control_commands.registry import find_command


class CommandKind(str, Enum):
    """A name of a command. It equals the plain text."""

    PAUSE = "pause"
    RESUME = "resume"
    ROLLBACK = "rollback"
    SKIP = "skip"
    LR = "lr"
    SHRINK_EMBEDDING = "shrink-embedding"
    CHECKPOINT = "checkpoint"
    MODE = "mode"
    STOP = "stop"
    ANSWER = "answer"
    ACCEPT = "accept"
    UNDO = "undo"

    @classmethod
    def _missing_(cls, value: object) -> CommandKind | None:
        """Accept the names of older versions."""
        kind = find_command(value)
        if kind is None or kind.name == value:
            return None
        return cls(kind.name)
