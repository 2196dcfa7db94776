"""commands/: one JSON file per command.

The sender renames it into place. It is removed once its answer is in the journal. Reading the
folder never raises because of its files. A file that is not a valid command is returned as a
refusal with its reason. A part of `guardrail.rundir.run_directory`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.events.decisions import SamplesTaken
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.files import as_float, encode_json, replace_file
from guardrail.core.records.commands import Command
from guardrail.core.records.record import Record
from guardrail.core.text import clean_text
from guardrail.decide.control_commands.arguments import MAX_STEP
from guardrail.decide.control_commands.registry import command_names, find_command, own_lines

MAX_BYTES = 64 * 1024  # of one file
MAX_ID, MAX_REASON, MAX_KIND, MAX_WHO = 128, 400, 40, 256  # characters
_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_ID}}}")
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]")
# JSON has no such numbers, so they are written as text.
_SPECIAL_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Refusal(Record, frozen=True, kw_only=True):
    """A file of the folder that is not a valid command.

    Attributes:
        id: the command's own id, where it has a valid one; else made of the file name.
        problem: which check refused it, in one or two words that stay, such as "not_json".
        reason: what is wrong, as a sentence.
        kind, value, who: as the file says, as far as it can be read.
    """

    id: str
    problem: str
    reason: str
    kind: str = ""
    value: float = 0.0
    who: str = ""


def make_answer(to: Command | Refusal, *, applied: bool, reason: str = "") -> CommandAnswered:
    """Return the journal line that answers a command or a refused file."""
    if not reason and isinstance(to, Refusal):
        reason = to.reason
    effect = "refused"
    if applied:
        effect = "applied"
    return CommandAnswered(
        id=to.id, command=str(to.kind), value=to.value, who=to.who, effect=effect, reason=reason
    )


def check_command(command: Command) -> str | None:
    """Return why a command can never be carried out, as the end of a sentence; None if it can.

    Pure. Whether it can be carried out *now* depends on the run; see `ControlCommand.refuse`.
    """
    if not _ID.fullmatch(command.id):
        return f"the id must be 1 to {MAX_ID} letters, digits, dots, dashes or underscores"
    if not 0 <= command.at_step < MAX_STEP:
        return f"at_step must be a step (0: now), not {command.at_step}"
    if not math.isfinite(command.time):
        return "the time must be a finite number of seconds"
    kind = find_command(command.kind)
    if kind is None:
        return f"its kind is none of {', '.join(command_names())}"
    return kind.argument.check(kind.name, command.value) or None


def find_interrupted(events: Iterable[Event]) -> dict[str, int]:
    """Return the commands that were accepted, but whose action is not in the journal.

    A process died between the two lines: the action comes directly after the answer. Pure.

    Returns:
        id of the command -> step after which its line belongs.
    """
    lines = own_lines()
    actions = tuple(lines.values())
    found: dict[str, tuple[type[Event], int]] = {}
    for event in events:
        if isinstance(event, CommandAnswered):
            line = lines.get(event.command)
            if line is not None and event.is_applied:
                found[event.id] = line, event.step
        elif isinstance(event, actions) and _is_by_command(event):
            found = {id: one for id, one in found.items() if not isinstance(event, one[0])}
    return {id: step for id, (_, step) in found.items()}


def _is_by_command(event: Event) -> bool:
    """Return whether a command has caused this line, not the guard itself."""
    if not isinstance(event, SamplesTaken):
        return True
    if event.span is None:
        return "span" not in event.unreadable  # only a command writes a line without samples
    return event.is_by_user


class Inbox:
    """The commands folder of one run.

    Args:
        folder: `commands/` of a run directory.
        owner: uid of the user whose commands count.

    Attributes:
        problem: why the folder could not be read at the last scan; "" if it could.
    """

    def __init__(self, folder: Path, *, owner: int) -> None:
        self.folder = folder
        self.owner = owner
        self.problem = ""
        self._names: dict[str, str] = {}  # command id -> file name
        self._first_names: dict[str, str] = {}  # the same, also of commands that are answered
        # (name, inode) of files that are answered and cannot be removed
        self._stuck: set[tuple[str, int]] = set()

    def send(self, command: Command) -> None:
        """Write a command into the folder. Raises OSError."""
        id = _NOT_IN_ID.sub("_", command.id)[:MAX_ID]
        replace_file(self.folder / f"{time.time_ns():020d}-{id}.json", encode_json(command))

    def scan(self) -> tuple[list[Command], list[Refusal]]:
        """Return the commands and refusals that wait for an answer, oldest first."""
        commands: list[Command] = []
        refusals: list[Refusal] = []
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            folder = os.open(self.folder, flags)
        except FileNotFoundError:
            self.problem = ""  # the first sender makes the folder
            return commands, refusals
        except OSError as error:
            self.problem = f"commands/ cannot be opened: {error.strerror or error}"
            return commands, refusals
        self.problem = ""
        try:
            for name in self._names_by_age(folder):
                found = self._read_checked(folder, name)
                if isinstance(found, Command):
                    commands.append(found)
                elif found is not None:
                    refusals.append(found)
                if found is not None:
                    self._names[found.id] = name
        finally:
            os.close(folder)
        return commands, refusals

    def remove(self, id: str) -> None:
        """Remove the file of an answered command. If that fails, it is ignored from then on."""
        if id not in self._names:
            self.scan()
        name = self._names.pop(id, None)
        if name is None:
            return
        path = self.folder / name
        try:
            with contextlib.suppress(IsADirectoryError, PermissionError):
                path.unlink()
                return
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            with contextlib.suppress(OSError):
                self._stuck.add((name, path.lstat().st_ino))

    def _names_by_age(self, folder: int) -> list[str]:
        """Return the file names, oldest first; of equal age, by name.

        Files that are still being written begin with a dot.
        """
        found = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        if (entry.name, info.st_ino) not in self._stuck:
                            found.append((info.st_mtime_ns, entry.name))
        except OSError as error:
            self.problem = f"commands/ cannot be read: {error.strerror or error}"
        return [name for _, name in sorted(found)]

    def _read_checked(self, folder: int, name: str) -> Command | Refusal | None:
        """Return the same as `_read_file`. Never raises, so the other files are read."""
        try:
            found = self._read_file(folder, name)
        except Exception as error:  # hostile content that no other check expects
            found = _refuse(
                name, "not_understood", f"it cannot be understood ({type(error).__name__})"
            )
        if isinstance(found, Command):
            first = self._first_names.setdefault(found.id, name)
            if first != name:
                return _refuse(name, "used_id", f"another command had the id {found.id} before")
        return found

    def _read_file(self, folder: int, name: str) -> Command | Refusal | None:
        """Return the content of a file; None: it is missing, or cannot be read now."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode):
                return _refuse(name, "no_file", "it is not a regular file")
            descriptor = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _refuse(name, "unreadable", f"it cannot be opened ({error.strerror})")
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                return _refuse(name, "no_file", "it is not a regular file")
            if info.st_uid != self.owner:
                owners = f"it belongs to user {info.st_uid}, the run to user {self.owner}"
                return _refuse(name, "other_owner", owners)
            if info.st_size > MAX_BYTES:
                sizes = f"it has {info.st_size} bytes, more than {MAX_BYTES}"
                return _refuse(name, "too_large", sizes)
            data = os.read(descriptor, MAX_BYTES + 1)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return _parse(name, data)


def _parse(name: str, data: bytes) -> Command | Refusal:
    try:
        fields = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:  # the errors of msgspec are ValueErrors
        return _refuse(name, "not_json", f"it is not JSON ({error})")
    if not isinstance(fields, dict):
        return _refuse(name, "not_an_object", "it is not a JSON object")
    kind = find_command(fields.get("kind"))
    if kind is None:
        known = f"its kind is none of {', '.join(command_names())}"
        return _refuse(name, "unknown_kind", known, fields)
    fields["kind"] = kind.name
    value = fields.get("value")
    if isinstance(value, str):
        fields["value"] = _SPECIAL_NUMBERS.get(value, value)
    elif value is None:
        fields["value"] = kind.argument.omitted or 0.0
    fields.setdefault("id", _id_from_name(name))
    try:
        command = msgspec.convert(fields, Command)
        reason = check_command(command)
    except (ValueError, OverflowError, RecursionError) as error:
        return _refuse(name, "wrong_type", f"it does not fit a command ({error})", fields)
    if reason is not None:
        return _refuse(name, "out_of_range", reason, fields)
    return msgspec.structs.replace(command, who=clean_text(command.who, MAX_WHO))


def _refuse(name: str, problem: str, reason: str, fields: dict[str, Any] | None = None) -> Refusal:
    fields = fields or {}
    id = fields.get("id")
    if not isinstance(id, str) or not _ID.fullmatch(id):
        id = _id_from_name(name)
    return Refusal(
        id=id,
        problem=problem,
        reason=clean_text(reason, MAX_REASON),
        kind=_as_text(fields.get("kind"), MAX_KIND),
        value=as_float(fields.get("value", 0.0)),
        who=_as_text(fields.get("who"), MAX_WHO),
    )


def _as_text(value: Any, limit: int) -> str:
    """Return text from JSON.

    Anything else is named by its type: its own text may be long, deep or impossible to make.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return clean_text(value, limit)
    return f"({type(value).__name__})"


def _id_from_name(name: str) -> str:
    return clean_text(_NOT_IN_ID.sub("_", name.removesuffix(".json"))[:MAX_ID])
