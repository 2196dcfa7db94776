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
from guardrail.core.events.run_state import CommandAnswered, Ended
from guardrail.core.files import open_file
from guardrail.core.records.commands import Command, Shown
from guardrail.core.records.status import Phase
from guardrail.core.renamed_keys import print_notice
from guardrail.core.text import escape_text
from guardrail.decide.control_commands.answer import Answer
from guardrail.decide.control_commands.base import ControlCommand, HoldsFor
from guardrail.decide.control_commands.registry import command_from, command_names, find_command
from guardrail.decide.control_commands.stop import Stop
from guardrail.decide.questions import open_question
from guardrail.operate.identity import sender_name
from guardrail.rundir import journal, processes
from guardrail.rundir.command_files import check_command
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory

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


def parse_command(action: str, value: str | None, *, at_step: int = 0) -> Command:
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
        who=sender_name(),
        time=time.time(),
        at_step=at_step,
    )
    if reason := check_command(command):
        raise UsageError(reason)
    return command


def bind_to_present(run: RunDirectory, command: Command, question: int | None = None) -> Command:
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


class JournalTail:
    """Reads what is written to a journal from now on, and only that.

    A journal that gets shorter has lost a torn line, or was copied back. It is read again from its
    beginning.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.journal_path
        self._seq, self._offset = journal.end_of(self._path)
        self._seen: tuple[int, int] | None = None  # size and inode at the last call

    def read_new(self) -> list[Event]:
        """Return the events since the last call, oldest first."""
        try:
            info = os.stat(self._path)
            if (info.st_size, info.st_ino) == self._seen:
                return []
            is_other_file = self._seen is not None and info.st_ino != self._seen[1]
            if info.st_size < self._offset or is_other_file:
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


def send_and_wait(run: RunDirectory, command: Command, *, seconds: float) -> Event | None:
    """Send a command and return its answer.

    A stop during the set-up, when no rank reads commands yet, is sent by signal as well. The end of
    the run is its answer.

    Args:
        seconds: to wait for the answer; 0: return None at once.

    Raises:
        UsageError: the run is not running, refuses, or does not answer in time.
    """
    status = run.known_status()
    if status is None or not is_alive(run, status):
        state = "no process of it responds"
        if status is not None and status.phase.ended:
            state = f"it {status.phase.value} at step {status.step}"
        raise UsageError(f"{run.name} is not running ({state})", kind="not_running")
    tail = JournalTail(run)
    run.send(command)
    is_stop = command.kind == Stop.name
    if is_stop and status.phase in (Phase.STARTING, Phase.SETUP):
        supervisor = processes.supervisor_of(run.path, status.supervisor_pid)
        if supervisor is not None:
            processes.send_signal(supervisor, signal.SIGUSR1)
    if seconds <= 0:
        return None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in tail.read_new():
            if isinstance(event, CommandAnswered) and event.id == command.id:
                _raise_refusal(run, event)
                return event
            if isinstance(event, Ended):
                if is_stop:
                    return event
                raise UsageError(
                    f"{run.name} ended before it answered ({event.message})", kind="ended"
                )
        time.sleep(POLL_SECONDS)
    status = run.read_status()
    if status is not None and status.commands_problem:
        raise UsageError(
            f"{run.name} cannot read commands: {status.commands_problem}. The command is queued.",
            kind="unread",
        )
    raise UsageError(
        f"no answer from {run.name} after {seconds:g} s. The command is queued and runs when the "
        "trainer responds.",
        kind="no_answer",
    )


def _raise_refusal(run: RunDirectory, answer: CommandAnswered) -> None:
    if not answer.is_applied:
        raise UsageError(f"{run.name} refuses: {answer.reason or answer.message}", kind="refused")


def format_answer(answer: Event | None) -> str:
    """Return the answer in one line."""
    if answer is None:
        return "sent"
    return f"step {answer.step}: {answer.message}"


def answer_as_dict(answer: Event | None) -> dict[str, Any]:
    """Return the answer for JSON: effect, and seq, step, timeline and data of its journal line."""
    if answer is None:
        return {"effect": "sent"}
    fixed = {
        "seq": answer.seq,
        "time": answer.time,
        "step": answer.step,
        "timeline": answer.timeline,
    }
    return {"effect": "applied", **fixed, "message": answer.message, **answer.data}
