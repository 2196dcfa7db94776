"""A command of a user, and the preview that the user saw."""

from __future__ import annotations

from guardrail.core.records.record import Record


class Shown(Record, frozen=True, kw_only=True):
    """The preview of a command when it was given. The command is refused if that has changed.

    Attributes:
        timeline: of the run; None: not shown.
        to_step, tier: the state that it restores; None, "": it restores none.
        steps_lost: applied steps that it discards.
        steps_lost_most: limit of `steps_lost`, since training goes on until the command arrives.
        instead_of: the factor, or index of the mode, that it replaces; None: not shown.
    """

    timeline: int | None = None
    to_step: int | None = None
    tier: str = ""
    steps_lost: int = 0
    steps_lost_most: int = 0
    instead_of: float | None = None


class Command(Record, frozen=True, kw_only=True):
    """One command of a user: a file in commands/.

    Kind and value fit into two float64 elements of the all-reduced vector.

    Attributes:
        kind: name of the command; see `guardrail.decide.control_commands.registry`.
        at_step: the command takes effect at the end of this step, for scripts and tests.
        question: journal line of the question that was open when the command was given; 0: none.
            None: the question that is open when the command arrives.
        shown: its preview; None: there was none.
    """

    id: str
    kind: str
    value: float = 0.0
    who: str = ""
    time: float = 0.0
    at_step: int = 0
    question: int | None = None
    shown: Shown | None = None
