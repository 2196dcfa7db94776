"""commands/: one JSON file a command, renamed into place by its sender, removed once its answer is
in the journal.

A part of `guardrail.rundir.run_directory`. Whatever lies in the folder, reading it never raises:
what cannot be obeyed is returned as a refusal with its reason.
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

from guardrail.core.files import as_float, encode_json, replace_file
from guardrail.core.records import (
    OLD_COMMANDS,
    Command,
    CommandKind,
    Event,
    Mode,
    Record,
    origin_of_span,
)
from guardrail.core.text import clean_text

MAX_BYTES = 64 * 1024
MAX_SKIP = 100_000  # batches that one `skip` may leave out
MAX_LR_FACTOR = 100.0
_MAX_STEP = 2**53  # steps travel as float64
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Commands whose deed is a line of its own, behind that of the answer.
DEEDS = {CommandKind.SKIP: "skipped", CommandKind.ROLLBACK: "rollback", CommandKind.UNDO: "undo"}
_VALUELESS = (
    CommandKind.PAUSE,
    CommandKind.RESUME,
    CommandKind.CHECKPOINT,
    CommandKind.ACCEPT,
    CommandKind.STOP,
)


class Refusal(Record, frozen=True, kw_only=True):
    """A file of the inbox that cannot be obeyed. `id` is the command's own where it has one, else
    the file name.
    """

    id: str
    reason: str
    kind: str = ""
    value: float = 0.0
    who: str = ""


def check_command(command: Command) -> str | None:
    """Why a command can never be obeyed, as the end of a sentence; None for one that makes sense.

    Pure. Whether it can be obeyed *now* (a rollback target that exists, an answer to an open
    question) is for the guard to say.
    """
    kind, value = command.kind, command.value
    whole = math.isfinite(value) and value == int(value)
    if not _ID.fullmatch(command.id):
        return "the id must be 1 to 128 letters, digits, dots, dashes or underscores"
    if not 0 <= command.at_step < _MAX_STEP:
        return f"at_step must be a step (0: now), not {command.at_step}"
    if not math.isfinite(command.time):
        return "the time must be a finite number of seconds"
    if kind in _VALUELESS:
        return None if value == 0 else f"{kind.value} takes no value, not {value:g}"
    if kind is CommandKind.ROLLBACK:
        good = math.isnan(value) or (whole and 0 <= value < _MAX_STEP)
        return (
            None
            if good
            else f"rollback takes a step, or nan for the newest good one, not {value:g}"
        )
    if kind is CommandKind.UNDO:
        good = math.isnan(value) or (whole and 1 <= value < _MAX_STEP)
        return (
            None
            if good
            else f"undo takes the seq of a journal line, or nan for the newest decision, not {value:g}"
        )
    if kind is CommandKind.SKIP:
        return (
            None
            if whole and 1 <= value <= MAX_SKIP
            else f"skip takes 1 to {MAX_SKIP} batches, not {value:g}"
        )
    if kind is CommandKind.LR:
        return (
            None
            if 0 < value <= MAX_LR_FACTOR
            else f"lr takes a factor in (0, {MAX_LR_FACTOR:g}], not {value:g}"
        )
    if kind is CommandKind.SHRINK_EMBEDDING:
        return None if 0 < value <= 1 else f"{kind.value} takes a factor in (0, 1], not {value:g}"
    count, noun = (
        (len(Mode), "mode takes a mode")
        if kind is CommandKind.MODE
        else (3, "answer takes a choice")
    )
    return None if whole and 0 <= value < count else f"{noun} from 0 to {count - 1}, not {value:g}"


def undone(events: Iterable[Event]) -> dict[str, int]:
    """Commands that were taken, and whose deed a death has kept from the journal: id -> step behind
    which it belongs.

    Pure. A deed comes directly behind its answer.
    """
    found: dict[str, tuple[str, int]] = {}
    for event in events:
        if event.kind == "command":
            deed = DEEDS.get(str(event.data.get("command")))  # type: ignore[call-overload]  # a str is its own member
            if deed is not None and event.data.get("effect") == "applied":
                found[str(event.data.get("id"))] = deed, event.step
        elif event.kind == "undo" or (
            event.kind in DEEDS.values() and origin_of_span(event.data.get("span")) == "user"
        ):
            found = {id: (deed, step) for id, (deed, step) in found.items() if deed != event.kind}
    return {id: step for id, (_, step) in found.items()}


class Inbox:
    """The commands folder of one run.

    Args:
        folder: `commands/` of a run directory.
        owner: uid whose commands are obeyed.
    """

    def __init__(self, folder: Path, *, owner: int) -> None:
        self.folder = folder
        self.owner = owner
        self.problem = ""  # why the folder could not be read at the last scan
        self._names: dict[str, str] = {}  # command id -> file name
        self._first_names: dict[str, str] = {}  # the same, also of commands that are answered
        # answered, but the file system would not let go of them
        self._stuck: set[tuple[str, int]] = set()

    def send(self, command: Command) -> None:
        """Put a command into the inbox; OSError where that is impossible."""
        name = f"{time.time_ns():020d}-{re.sub(r'[^A-Za-z0-9._-]', '_', command.id)[:128]}.json"
        replace_file(self.folder / name, encode_json(command))

    def scan(self) -> tuple[list[Command], list[Refusal]]:
        """What waits for an answer, oldest first."""
        commands: list[Command] = []
        refusals: list[Refusal] = []
        try:
            folder = os.open(
                self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except FileNotFoundError:
            self.problem = ""  # whoever sends a command makes the folder
            return commands, refusals
        except OSError as error:
            self.problem = f"commands/ cannot be opened: {error.strerror or error}"
            return commands, refusals
        self.problem = ""
        try:
            for name in self._waiting(folder):
                found = self._checked(folder, name)
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
        """Forget an answered command. What cannot be unlinked is passed over from now on."""
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

    def _waiting(self, folder: int) -> list[str]:
        """Names by age. Files still being written begin with a dot; the name settles equal
        times.
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

    def _checked(self, folder: int, name: str) -> Command | Refusal | None:
        """What a file holds. Whatever is wrong with it, it is refused and the others are read all
        the same.
        """
        try:
            found = self._read(folder, name)
        except Exception as error:  # a kind of hostile content that nothing above has thought of
            found = _refuse(name, f"it cannot be understood ({type(error).__name__})")
        if isinstance(found, Command):
            first = self._first_names.setdefault(found.id, name)
            if first != name:
                return _refuse(name, f"another command has had the id {found.id} before")
        return found

    def _read(self, folder: int, name: str) -> Command | Refusal | None:
        """None: the file is gone, or cannot be read at the moment."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode):
                return _refuse(name, "it is not a regular file")
            descriptor = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _refuse(name, f"it cannot be opened ({error.strerror})")
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                return _refuse(name, "it is not a regular file")
            if info.st_uid != self.owner:
                return _refuse(
                    name, f"it belongs to user {info.st_uid}, the run to user {self.owner}"
                )
            if info.st_size > MAX_BYTES:
                return _refuse(name, f"it has {info.st_size} bytes, more than {MAX_BYTES}")
            data = os.read(descriptor, MAX_BYTES + 1)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return _parse(name, data)


def _parse(name: str, data: bytes) -> Command | Refusal:
    try:
        fields = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        return _refuse(name, f"it is not JSON ({error})")
    if not isinstance(fields, dict):
        return _refuse(name, "it is not a JSON object")
    kinds = [kind.value for kind in CommandKind]
    if not isinstance(fields.get("kind"), str) or fields["kind"] not in (*kinds, *OLD_COMMANDS):
        return _refuse(name, f"its kind is none of {', '.join(kinds)}", fields)
    # Without a value `rollback` means the newest good state, not step 0, and `undo` the newest
    # decision.
    if (
        fields["kind"] in (CommandKind.ROLLBACK.value, CommandKind.UNDO.value)
        and fields.get("value") is None
    ):
        fields["value"] = math.nan
    if isinstance(fields.get("value"), str):
        fields["value"] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(
            fields["value"], fields["value"]
        )
    if fields.get("value", 0) is None:
        del fields["value"]
    fields.setdefault("id", _id_of(name))
    try:
        command = msgspec.convert(fields, Command)
        reason = check_command(command)
    except (ValueError, OverflowError, RecursionError) as error:
        return _refuse(name, f"it does not fit a command ({error})", fields)
    if reason is not None:
        return _refuse(name, reason, fields)
    return msgspec.structs.replace(command, who=clean_text(command.who, 256))


def _refuse(name: str, reason: str, fields: dict[str, Any] | None = None) -> Refusal:
    fields = fields or {}
    id = fields.get("id")
    return Refusal(
        id=id if isinstance(id, str) and _ID.fullmatch(id) else _id_of(name),
        reason=clean_text(reason, 400),
        kind=_text(fields.get("kind"), 40),
        value=as_float(fields.get("value", 0.0)),
        who=_text(fields.get("who"), 256),
    )


def _text(value: Any, limit: int) -> str:
    """Text from JSON. Anything else is named by its type: its own text may be long, deep or
    impossible to make.
    """
    return (
        clean_text(value, limit)
        if isinstance(value, str)
        else f"({type(value).__name__})"
        if value is not None
        else ""
    )


def _id_of(name: str) -> str:
    return clean_text(re.sub(r"[^A-Za-z0-9._-]", "_", name.removesuffix(".json"))[:128])
