"""Commands to a run from outside: from words to a Command, into the inbox, and the answer out of
the journal.
"""

from __future__ import annotations

import difflib
import math
import os
import secrets
import signal
import time
from typing import Any

import msgspec

from guardrail.core.errors import UsageError
from guardrail.core.files import open_file
from guardrail.core.records import OLD_COMMANDS, Command, CommandKind, Event, Mode, Phase, Shown
from guardrail.core.renamed_keys import print_notice
from guardrail.core.text import escape_text
from guardrail.decide.questions import BY_HAND, CHOICES, open_question
from guardrail.operate.identity import who
from guardrail.rundir import journal, processes
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory, check_command

POLL_SECONDS = 0.1
_NEED_VALUE = {
    CommandKind.SKIP: "a number of batches",
    CommandKind.LR: "a factor",
    CommandKind.SHRINK_EMBEDDING: "a factor in (0, 1]",
    CommandKind.MODE: "a mode",
    CommandKind.ANSWER: "accept, continue or stop",
}


def parse(action: str, value: str | None, *, at_step: int = 0) -> Command:
    """Words of a command line -> a command that makes sense. Raises UsageError."""
    names = [kind.value for kind in CommandKind]
    if action in OLD_COMMANDS:
        print_notice(f"ctl {action}", f"ctl {OLD_COMMANDS[action]}")
        action = OLD_COMMANDS[action]
    if action not in names:
        close = difflib.get_close_matches(action, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(names)}"
        raise UsageError(f"no such command: {escape_text(action, 160)}\n  hint: {hint}")
    kind = CommandKind(action)
    if value is None and kind in _NEED_VALUE:
        raise UsageError(f"{action} needs {_NEED_VALUE[kind]}")
    command = Command(
        id=f"{time.time_ns():x}-{secrets.token_hex(4)}",
        kind=kind,
        value=_number(kind, value),
        who=who(),
        time=time.time(),
        at_step=at_step,
    )
    if reason := check_command(command):
        raise UsageError(reason)
    return command


def _number(kind: CommandKind, value: str | None) -> float:
    if value is None:
        return math.nan if kind in (CommandKind.ROLLBACK, CommandKind.UNDO) else 0.0
    if kind is CommandKind.MODE:
        modes = [mode.value for mode in Mode]
        if value not in modes:
            raise UsageError(f"mode takes one of {', '.join(modes)}, not {escape_text(value, 160)}")
        return float(modes.index(value))
    if kind is CommandKind.ANSWER:
        if value in CHOICES or value in ("0", "1", "2"):
            return float(CHOICES.index(value) if value in CHOICES else value)
        raise UsageError(f"answer takes one of {', '.join(CHOICES)}, not {value}")
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"{kind.value} takes a number, not {escape_text(value, 160)}") from None


def bound(run: RunDirectory, command: Command, question: int | None = None) -> Command:
    """The command for the run as it is now: it holds for no other question, and for no other
    timeline.

    So of two that send `rollback` at the same instant one goes back, and the other learns that the
    run has gone back.

    Args:
        question: journal line of the question that it answers; None: the one that is open.
    """
    status = run.read_status()
    if command.kind in BY_HAND and not command.at_step and status is not None:
        timeline = max([status.timeline, *(event.timeline for event in run.events()[-1:])])
        command = msgspec.structs.replace(command, shown=Shown(timeline=timeline))
    if (
        question is None
        and command.kind is not CommandKind.ANSWER
        and not (status is not None and status.question)
    ):
        question = 0
    if question is None:
        asked = open_question(run.events())  # the status is a second late
        if asked is None and status is not None and status.question:
            return command  # its line is not on disk: the run knows what it asks
        question = asked.seq if asked is not None else 0
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
    if command.kind is CommandKind.STOP and status.phase in (Phase.STARTING, Phase.SETUP):
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
                if command.kind is CommandKind.STOP:
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
