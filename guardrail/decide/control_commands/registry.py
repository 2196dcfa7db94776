"""All commands, and how a command file, a rank or a journal line names one.

A new command is a file in this folder and an entry of `COMMANDS`.
"""

from __future__ import annotations

from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.records.commands import Command, Shown
from guardrail.decide.control_commands.accept import Accept
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor, ReplayTarget
from guardrail.decide.control_commands.checkpoint import WriteCheckpoint
from guardrail.decide.control_commands.lr import ScaleLearningRate
from guardrail.decide.control_commands.mode import ChangeMode
from guardrail.decide.control_commands.pause import Pause
from guardrail.decide.control_commands.preview import Preview
from guardrail.decide.control_commands.resume import Resume
from guardrail.decide.control_commands.rollback import Rollback
from guardrail.decide.control_commands.shrink_embedding import ShrinkEmbedding
from guardrail.decide.control_commands.skip import Skip
from guardrail.decide.control_commands.stop import Stop
from guardrail.decide.control_commands.undo import Undo

# The order of the help, of the keys and of docs/. The ranks send 1 + the index.
COMMANDS: tuple[type[ControlCommand], ...] = (
    Pause,
    Resume,
    Rollback,
    Skip,
    ScaleLearningRate,
    ShrinkEmbedding,
    WriteCheckpoint,
    ChangeMode,
    Undo,
    Accept,
    Answer,
    Stop,
)


def find_command(name: object) -> type[ControlCommand] | None:
    """Return the command with this name, also one of an older version; None: there is none."""
    for kind in COMMANDS:
        if name == kind.name or name in kind.aliases:
            return kind
    return None


def command_names() -> list[str]:
    """Return the present name of each command."""
    return [kind.name for kind in COMMANDS]


def old_names() -> dict[str, str]:
    """Return names of older versions -> present names."""
    return {alias: kind.name for kind in COMMANDS for alias in kind.aliases}


def own_lines() -> dict[str, type[Event]]:
    """Return the commands whose action writes a journal line: name -> class of that line.

    The line comes directly after the answer.
    """
    return {kind.name: kind.own_line for kind in COMMANDS if kind.own_line is not None}


def command_from(given: Command) -> ControlCommand:
    """Return the command of a command file. Raises KeyError for an unknown name."""
    kind = find_command(given.kind)
    if kind is None:
        raise KeyError(given.kind)
    return kind(given.value, question=given.question)


def numbers_of(command: ControlCommand) -> tuple[int, float]:
    """Return a command as it travels to the other ranks: (1 + index of its kind, its value)."""
    return 1 + COMMANDS.index(type(command)), command.value


def command_of(number: int, value: float) -> ControlCommand:
    """Return the command of two numbers; the inverse of `numbers_of`."""
    return COMMANDS[number - 1](value)


def replay_line(event: CommandAnswered, target: ReplayTarget) -> None:
    """Apply what an answer in the journal means after a restart.

    A refused command and one of another version mean nothing.

    Raises:
        ValueError: the line is damaged.
    """
    if not event.is_applied:
        return
    event.check_readable("value")
    kind = find_command(event.command)
    if kind is None:
        return
    value = event.value
    if value is None:
        value = kind.argument.omitted
    if value is None:
        raise ValueError(f"line {event.seq}: {kind.name} without its value")
    kind(value).replayed(target, event)


def shown_in(preview: Preview) -> Shown:
    """Return what a command holds for that is given after a look at `preview`."""
    kind = find_command(preview.command)
    if kind is None or kind.holds_for is not HoldsFor.TIMELINE:
        return Shown(instead_of=preview.instead_of)
    return Shown(
        timeline=preview.timeline,
        to_step=preview.to_step,
        tier=preview.tier,
        steps_lost=preview.steps_lost,
        steps_lost_most=preview.steps_lost_most,
    )
