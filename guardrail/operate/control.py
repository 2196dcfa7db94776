"""Send commands to a run: from a command line to a command file, and the answer from the journal."""

from __future__ import annotations

import difflib
import os
import secrets
import signal
import time
from typing import Any

import msgspec

from guardrail.core.errors import UsageError
from guardrail.core.events.event import Event
from guardrail.core.files import open_file
from guardrail.core.records import Command, Phase, Shown
from guardrail.core.renamed_keys import print_notice
from guardrail.core.text import escape_text
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor
from guardrail.decide.control_commands.registry import command_from, command_names, find_command
from guardrail.decide.control_commands.stop import Stop
from guardrail.decide.questions import open_question
from guardrail.operate.identity import who
from guardrail.rundir import journal, processes
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory, check_command

POLL_SECONDS = 0.1


def find_kind(name: str) -> type[ControlCommand]:
    """Return the command with this name; an old name prints a notice. Raises UsageError."""
    kind = find_command(name)
    if kind is None:
        names = command_names()
        hint = f"commands: {', '.join(names)}"
        if close := difflib.get_close_matches(name, names, n=1):
            hint = f"did you mean {close[0]}?"
        raise UsageError(f"no such command: {escape_text(name, 160)}\n  hint: {hint}")
    if name != kind.name:
        print_notice(f"ctl {name}", f"ctl {kind.name}")
    return kind


def parse(action: str, value: str | None, *, at_step: int = 0) -> Command:
    """Return the command of a command line.

    Args:
        action: name of the command.
        value: its argument; None: none was given.
        at_step: delays the effect to the end of that step.

    Raises:
        UsageError: the command can never be carried out.
    """
    kind = find_kind(action)
    command = Command(
        id=f"{time.time_ns():x}-{secrets.token_hex(4)}",
        kind=kind.name,
        value=kind.argument.parse(kind.name, value),
        who=who(),
        time=time.time(),
        at_step=at_step,
    )
    if reason := check_command(command):
        raise UsageError(reason)
    return command


def bound(run: RunDirectory, command: Command, question: int | None = None) -> Command:
    """Return the command for the present question and timeline: it holds for no others.

    Of two `rollback` commands that are sent at the same instant, one restores a state. The other is
    refused, because the run is on another timeline then.

    Args:
        question: journal line of the question that it answers; None: the one that is open.
    """
    status = run.read_status()
    holds_for = command_from(command).holds_for
    if holds_for is HoldsFor.TIMELINE and not command.at_step and status is not None:
        timeline = max([status.timeline, *(event.timeline for event in run.events()[-1:])])
        command = msgspec.structs.replace(command, shown=Shown(timeline=timeline))
    is_asking = status is not None and bool(status.question)
    if question is None and not is_asking and command.kind != Answer.name:
        question = 0
    if question is None:
        asked = open_question(run.events())  # the status is up to a second old
        if asked is None and is_asking:
            return command  # the line is not on disk yet: the run itself names its question
        question = 0
        if asked is not None:
            question = asked.seq
    return msgspec.structs.replace(command, question=question)


class Tail:
    """What is written to a journal from now on; each look reads only that.

    A journal that gets shorter has lost a torn line, or was copied back: it is read again from its
    beginning.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.journal_path
        self._seq, self._offset = journal.end_of(self._path)
        self._seen: tuple[int, int] | None = None  # size and inode at the last look

    def new(self) -> list[Event]:
        """The events since the last look, oldest first."""
        try:
            info = os.stat(self._path)
            if (info.st_size, info.st_ino) == self._seen:
                return []
            other = self._seen is not None and info.st_ino != self._seen[1]
            if info.st_size < self._offset or other:
                self._offset = 0
            with open_file(self._path) as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._seen = (info.st_size, info.st_ino)
        events, used = journal.parse(data)
        self._offset += used
        fresh = [event for event in events if event.seq > self._seq]
        self._seq = max((event.seq for event in fresh), default=self._seq)
        return fresh


def send(run: RunDirectory, command: Command, *, seconds: float) -> Event | None:
    """Send and wait for the answer; None if `seconds` is 0.

    A stop during the set-up, when no rank reads the inbox yet, goes by signal as well and is
    answered by the end.

    Raises:
        UsageError: the run is not running, refuses, or does not answer in time.
    """
    status = run.known_status()
    if status is None or not is_alive(run, status):
        state = (
            f"it {status.phase.value} at step {status.step}"
            if status and status.phase.ended
            else "no sign of life"
        )
        raise UsageError(f"{run.name} is not running ({state})")
    tail = Tail(run)
    run.send(command)
    if command.kind == Stop.name and status.phase in (Phase.STARTING, Phase.SETUP):
        supervisor = processes.supervisor_of(run.path, status.supervisor_pid)
        if supervisor is not None:
            processes.tell(supervisor, signal.SIGUSR1)
    if seconds <= 0:
        return None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in tail.new():
            if event.kind == "command" and event.data.get("id") == command.id:
                if event.data.get("effect") != "applied":
                    raise UsageError(
                        f"{run.name} refuses: {event.data.get('reason') or event.message}"
                    )
                return event
            if event.kind == "ended":
                if command.kind == Stop.name:
                    return event
                raise UsageError(f"{run.name} ended before it answered ({event.message})")
        time.sleep(POLL_SECONDS)
    status = run.read_status()
    if status is not None and status.commands_problem:
        raise UsageError(
            f"{run.name} cannot read commands: {status.commands_problem}; this one waits in its inbox"
        )
    raise UsageError(
        f"{run.name} has not answered within {seconds:g} s; the command waits in its inbox"
    )


def sentence(answer: Event | None) -> str:
    """The answer for a person."""
    if answer is None:
        return "sent"
    return f"step {answer.step}: {answer.message}"


def as_dict(answer: Event | None) -> dict[str, Any]:
    """The answer for a script: effect, and the journal line's seq, step, timeline and data."""
    if answer is None:
        return {"effect": "sent"}
    fixed = {
        "seq": answer.seq,
        "time": answer.time,
        "step": answer.step,
        "timeline": answer.timeline,
    }
    return {"effect": "applied", **fixed, "message": answer.message, **answer.data}
