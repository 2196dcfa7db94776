"""A run directory: the whole truth of a run, and the only channel between its processes.

Only plain appends and atomic replaces, so that a reader on any machine that sees the files sees a
true state, and a crash at any moment leaves one. This module, with its parts `journal`, `metrics`,
`inbox` and `runlock`, is the only code that reads or writes one. It imports neither torch nor, at
module level, numpy.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import errno
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from guardrail.core import secret
from guardrail.core.errors import DiskRefuses, RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.files import (
    FILE_MODE,
    FOLDER_MODE,
    LONGEST_NAME,
    TEMPORARY,
    encode_json,
    overwrite_file,
    read_file,
    replace_file,
    sync_folder,
    why_unwritable,
)
from guardrail.core.records import Command, NodeStatus, RankStatus, Status
from guardrail.core.text import clean_text
from guardrail.decide.timelines import TimelineIndex
from guardrail.rundir import journal
from guardrail.rundir.command_files import Inbox, Refusal, check_command, find_interrupted
from guardrail.rundir.journal import findings_of, last_turn, outcome_of, span_of
from guardrail.rundir.metrics import MetricsView, MetricsWriter, read_metrics, read_rows
from guardrail.rundir.run_lock import Holder, RunLock, holder_of

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Holder",
    "MetricsView",
    "MetricsWriter",
    "Refusal",
    "RunDirectory",
    "RunLock",
    "check_command",
    "find_run",
    "findings_of",
    "list_runs",
    "span_of",
]

SCREEN_SECONDS = 15.0  # a screen that has not been seen for this long is gone
_FOLDERS = ("checkpoints", "commands", "logs", "ranks", "screens", "tensorboard")
_NAME = re.compile(r"[^\W_][\w.+=@-]{0,99}")
NAME = "1 to 100 letters, digits, and . _ + = @ - inside"


def is_run_name(name: str) -> bool:
    """Whether a folder of runs can have this name. A letter may take four bytes."""
    return bool(_NAME.fullmatch(name)) and len(name.encode()) <= LONGEST_NAME


class RunDirectory:
    """One run on disk. Cheap to make; `open` and `create` check, the constructor does not."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.commands = self.path / "commands"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self._ranks = self.path / "ranks"
        self._screens = self.path / "screens"
        self._inbox: Inbox | None = None
        self._undone: dict[str, int] = {}
        # what an earlier trainer answered without removing it has been removed
        self._recovered = False
        self.commands_problem = ""  # why commands/ could not be read at the last look

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def name(self) -> str:
        """NAME/YYYY-MM-DD-NN."""
        return f"{self.path.parent.name}/{self.path.name}"

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str, config_toml: str) -> RunDirectory:
        """Make ROOT/NAME/YYYY-MM-DD-NN with its configuration, complete before anybody can see it.

        Several processes may do this at once: each gets its own number. Raises RunDirectoryError.
        """
        if not is_run_name(name):
            raise RunDirectoryError(f"{clean_text(name, 80)!r} is no name for a run: {NAME}")
        parent = Path(root) / name
        try:
            parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
            hidden = parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
            hidden.mkdir(mode=FOLDER_MODE)
            try:
                for folder in _FOLDERS:
                    (hidden / folder).mkdir(mode=FOLDER_MODE)
                replace_file(hidden / "config.toml", secret.mask_text(config_toml).encode("utf-8"))
                path = _claim(hidden, parent)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            sync_folder(parent)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot make a run directory in {parent}: {error.strerror}"
            ) from error
        return cls(path.absolute())

    @classmethod
    def create_at(cls, path: Path, config_toml: str) -> RunDirectory:
        """A run directory at exactly this place, which is empty or not there yet. Raises
        RunDirectoryError.
        """
        try:
            path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            if any(path.iterdir()):
                is_run = (path / "config.toml").exists()
                hint = "guardrail launch --resume goes on with a run" if is_run else "not empty"
                raise RunDirectoryError(f"{path}: exists already\n  hint: {hint}")
            for folder in _FOLDERS:
                (path / folder).mkdir(mode=FOLDER_MODE)
            replace_file(path / "config.toml", secret.mask_text(config_toml).encode("utf-8"))
        except FileExistsError as error:
            raise RunDirectoryError(
                f"{path}: another launch is making a run there, or it is no folder"
            ) from error
        except OSError as error:
            raise RunDirectoryError(
                f"cannot make a run directory at {path}: {error.strerror}"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """An existing run. Raises RunDirectoryError: nothing there, not a run, not yours."""
        where = Path(path).absolute()
        try:
            known = any(
                (where / name).exists() for name in ("config.toml", "status.json", "journal.jsonl")
            )
            if known:
                os.listdir(where)
        except PermissionError as error:
            raise RunDirectoryError(f"{where}: not yours to read") from error
        if not known:
            raise RunDirectoryError(
                f"{where}: {'not a run directory' if where.is_dir() else 'no such run'}"
            )
        return cls(where)

    # -- configuration and status

    def config_text(self, *, display: bool = False) -> str:
        """The resolved configuration as TOML, without secrets. RunDirectoryError where it cannot be
        read.

        Args:
            display: for a screen or a report: also masks whatever else is called like a secret.
        """
        try:
            text = read_file(self.path / "config.toml").decode("utf-8")
            return secret.mask_text(text, display=display)  # older versions wrote them out
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise RunDirectoryError(f"{self.path / 'config.toml'}: {reason}") from error

    def write_config(self, text: str) -> None:
        replace_file(self.path / "config.toml", secret.mask_text(text).encode("utf-8"))

    def read_status(self) -> Status | None:
        """None while there is none, or when a newer version wrote something this one cannot
        understand.
        """
        return _read(self.path / "status.json", Status)

    def known_status(self) -> Status | None:
        """`read_status`; where that is None for a run that has ended, what the journal says of its
        end.
        """
        if (status := self.read_status()) is not None:
            return status
        try:
            return self.status_of_end(self.events())
        except OSError:
            return None

    def status_of_end(self, events: Sequence[Event]) -> Status | None:
        """What is left of the status of a run that has ended; None where the events say that it
        goes on, or nothing.
        """
        last = last_turn(events)
        if last is None or last.kind != "ended" or (outcome := outcome_of(last)) is None:
            return None
        phase, exit_code = outcome
        return Status(
            run=self.name,
            phase=phase,
            step=last.step,
            timeline=last.timeline,
            heartbeat=last.time,
            exit_code=exit_code.value,
        )

    def write_status(self, status: Status) -> None:
        """Replace status.json; not synced, since a second later it is replaced again. Raises
        OSError.
        """
        replace_file(self.path / "status.json", encode_json(status), sync=False)

    def write_last_status(self, status: Status) -> None:
        """`write_status`; where the disk has no room for a second file, over the one that is there.
        Raises OSError.
        """
        try:
            self.write_status(status)
        except OSError:
            overwrite_file(self.path / "status.json", encode_json(status))

    def check_writable(self) -> None:
        """Raises DiskRefuses when nothing can be written here."""
        if why := why_unwritable(self.path):
            raise DiskRefuses(self.path, why)

    def read_ranks(self) -> list[RankStatus]:
        """What each rank reported last, by rank. Files of single ranks are those of older
        versions.
        """
        found: dict[int, RankStatus] = {}
        for name in self._names_of_ranks():
            if name.startswith("node-"):
                node = _read(self._ranks / name, NodeStatus)
                reports = node.ranks if node is not None else ()
            else:
                one = _read(self._ranks / name, RankStatus)
                reports = (one,) if one is not None else ()
            for report in reports:
                before = found.get(report.rank)
                if before is None or (before.incarnation, before.heartbeat) < (
                    report.incarnation,
                    report.heartbeat,
                ):
                    found[report.rank] = report
        return [found[rank] for rank in sorted(found)]

    def write_node(self, status: NodeStatus) -> None:
        """Replace what the ranks of one node have reported. Raises OSError."""
        self._folder(self._ranks)
        replace_file(self._ranks / f"node-{status.node}.json", encode_json(status), sync=False)

    def write_rank(self, status: RankStatus) -> None:
        """A file for one rank, as older versions wrote it; now only where a node's local disk takes
        none. OSError.
        """
        self._folder(self._ranks)
        replace_file(self._ranks / f"rank-{status.rank:05d}.json", encode_json(status), sync=False)

    def remove_ranks(self) -> None:
        """Forget the ranks of an earlier start, before the next ones are started."""
        for name in self._names_of_ranks():
            with contextlib.suppress(OSError):
                (self._ranks / name).unlink()

    def _names_of_ranks(self) -> list[str]:
        try:
            return sorted(
                name for name in os.listdir(self._ranks) if name.startswith(("node-", "rank-"))
            )
        except OSError:
            return []

    # -- who was told

    def notified(self) -> int | None:
        """Seq of the newest event that somebody was to be told of; None if nothing was remembered
        yet.
        """
        try:
            return int(read_file(self.path / "notified"))
        except (OSError, ValueError):
            return None

    def write_notified(self, seq: int) -> None:
        """Remember it, synced. Raises OSError."""
        replace_file(self.path / "notified", f"{seq}\n".encode())

    # -- the one trainer

    def lock(self, who: str) -> RunLock:
        """Become the run's only trainer until the lock is released or this process ends, however it
        ends.

        Raises RunDirectoryError that names the holder.
        """
        return RunLock(self.path / "run.lock", who)

    def lock_holder(self) -> Holder | None:
        """The running trainer, or None."""
        return holder_of(self.path / "run.lock")

    # -- the journal

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def append(
        self,
        kind: str,
        message: str = "",
        *,
        step: int = 0,
        timeline: int = 0,
        happened: float | None = None,
        **data: Any,
    ) -> Event:
        """Write one event and sync it. Any process of the run may do so, at any time.

        Args:
            happened: wall time of the event, seconds since the epoch; None: now.

        Raises:
            OSError: the event is not on disk, and nothing half written is left.
        """
        at = time.time() if happened is None else happened
        return journal.append_event(
            self.journal_path, kind, message, step=step, timeline=timeline, data=data, at=at
        )

    def events(self, after: int = 0) -> list[Event]:
        """Events with seq > `after`, oldest first. A torn last line and unknown fields do no
        harm.
        """
        return journal.read_events(self.journal_path, after=after)

    # -- metrics

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.bin"

    def metrics_writer(self, further: Sequence[str] = ()) -> MetricsWriter:
        """For the holder of the lock; a run that begins gets `further` columns besides the usual.
        Raises OSError.
        """
        return MetricsWriter(self.metrics_path, self.path / "metrics.json", further=further)

    def metrics(self, columns: Sequence[str] | None = None) -> MetricsView:
        """The rows that are complete now; empty while there are none."""

        def timelines() -> TimelineIndex:
            known = TimelineIndex()
            known.add_events(self.events())
            return known

        return read_metrics(
            self.metrics_path, self.path / "metrics.json", columns=columns, timelines=timelines
        )

    def rows(self, first: int, end: int) -> tuple[tuple[str, ...], np.ndarray]:
        """(Columns, rows [first, end) of the metrics), read and not mapped: safe while the file may
        be cut.
        """
        return read_rows(self.metrics_path, self.path / "metrics.json", first, end)

    # -- commands

    @property
    def inbox(self) -> Inbox:
        if self._inbox is None:
            self._inbox = Inbox(self.commands, owner=self.path.stat().st_uid)
        return self._inbox

    def send(self, command: Command) -> None:
        """Ask the run for something; the answer is a journal line of kind `command` with the same
        id.

        Raises:
            RunDirectoryError: the command can never be obeyed, or the run belongs to somebody else.
            OSError: the file cannot be written.
        """
        reason = check_command(command)
        if reason is not None:
            raise RunDirectoryError(reason)
        if os.geteuid() != self.path.stat().st_uid:
            raise RunDirectoryError(f"{self.path}: not your run; only its owner may send commands")
        self._folder(self.commands)
        self.inbox.send(command)

    def commands_pending(self) -> list[Command]:
        """Commands that wait for an answer, oldest first. Never raises; see `commands_refused` for
        the rest.
        """
        return self.commands_waiting()[0]

    def commands_refused(self) -> list[Refusal]:
        """Files of the inbox that cannot be obeyed: broken, foreign, out of range. Each wants an
        answer as well.
        """
        return self.commands_waiting()[1]

    def commands_waiting(self) -> tuple[list[Command], list[Refusal]]:
        """Both, of one look at the folder. Never raises for what lies there; `commands_problem`
        says what failed.
        """
        try:
            found = self._pending()
        except OSError as error:
            self.commands_problem = f"commands/ cannot be read: {error.strerror or error}"
            return [], []
        self.commands_problem = self.inbox.problem
        return found

    def command_done(self, id: str) -> None:
        """Remove an answered command; its answer is in the journal already."""
        self.inbox.remove(id)

    def answer(
        self,
        to: Command | Refusal,
        *,
        applied: bool,
        reason: str = "",
        step: int = 0,
        timeline: int = 0,
    ) -> Event:
        """Journal the answer to a command, then remove its file. Raises OSError and keeps the
        file.
        """
        kind = str(to.kind)
        reason = reason or (to.reason if isinstance(to, Refusal) else "")
        effect = "applied" if applied else "refused"
        event = self.append(
            "command",
            f"{kind or 'command'} {effect}{f': {reason}' if reason else ''}",
            step=step,
            timeline=timeline,
            id=to.id,
            command=kind,
            value=to.value,
            who=to.who,
            effect=effect,
            reason=reason,
        )
        self.command_done(to.id)
        return event

    def _pending(self) -> tuple[list[Command], list[Refusal]]:
        commands, refusals = self.inbox.scan()
        if not self._recovered and (commands or refusals):
            # A crash between the answer and the removal of its file must not make it count twice.
            # What was answered and not done is due where it was said to take effect.
            events = self.events()
            self._undone = find_interrupted(events)
            answered = {
                str(event.data.get("id")) for event in events if event.kind == "command"
            } - set(self._undone)
            for id in {item.id for item in commands} | {item.id for item in refusals}:
                if id in answered:
                    self.inbox.remove(id)
            commands, refusals = self.inbox.scan()
        self._recovered = True
        return [self._due(command) for command in commands], refusals

    def _due(self, command: Command) -> Command:
        if command.id not in self._undone:
            return command
        # It was taken when what it was shown for still held; the question of that time went with
        # the process.
        at_step = max(command.at_step, self._undone[command.id])
        return msgspec.structs.replace(command, at_step=at_step, question=None, shown=None)

    # -- screens

    def screen_seen(self) -> None:
        """A screen says every few seconds that somebody watches. A full disk only makes it count as
        nobody.
        """
        with contextlib.suppress(OSError):
            self._folder(self._screens)
            _touch(
                self._screens
                / f"{clean_text(socket.gethostname(), 64).replace('/', '_')}-{os.getpid()}"
            )

    def screen_gone(self) -> None:
        with contextlib.suppress(OSError):
            (
                self._screens
                / f"{clean_text(socket.gethostname(), 64).replace('/', '_')}-{os.getpid()}"
            ).unlink()

    def screens(self) -> int:
        """Screens seen in the last 15 seconds, by the clock of the file system: those of their
        hosts may differ.
        """
        alive = 0
        with contextlib.suppress(OSError), os.scandir(self._screens) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".")]
            now = self._time_of_screens() if seen else 0.0
            for entry in seen:
                with contextlib.suppress(OSError):
                    alive += abs(now - entry.stat(follow_symlinks=False).st_mtime) < SCREEN_SECONDS
        return alive

    def _time_of_screens(self) -> float:
        """What the clock of the file system says; our own where nothing may be written."""
        try:
            return _touch(self._screens / ".clock")
        except OSError:
            return time.time()

    def _folder(self, path: Path) -> None:
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)


def list_runs(root: str | os.PathLike[str]) -> list[RunDirectory]:
    """All runs under ROOT/NAME/, newest first; folders that are no runs, or that cannot be read,
    are passed over.
    """
    found: list[tuple[float, str, RunDirectory]] = []
    for folder in _folders(Path(root)):
        for path in _folders(folder):
            with contextlib.suppress(RunDirectoryError, OSError):
                run = RunDirectory.open(path)
                found.append((_started(path), run.name, run))
    return [run for _, _, run in sorted(found, key=lambda item: item[:2], reverse=True)]


def find_run(spec: str | None, root: str | os.PathLike[str]) -> RunDirectory:
    """The run that a person means.

    Args:
        spec: a path, NAME (its newest run), NAME/DATE-NN, the unique beginning of one, or None: the
        newest run.

    Raises:
        RunDirectoryError: none or several match; says which come close.
    """
    if spec is not None and (os.sep in spec or spec in (".", "..")) and Path(spec).is_dir():
        return RunDirectory.open(spec)
    runs = list_runs(root)
    if spec and Path(spec).is_dir() and not any(run.name.startswith(spec) for run in runs):
        return RunDirectory.open(spec)
    if not runs:
        raise RunDirectoryError(
            f"no such run: {clean_text(spec or '', 200) or 'there is none'} in {root}"
        )
    if spec is None:
        return runs[0]
    spec = spec.rstrip("/")
    exact = [run for run in runs if spec in (run.name, run.path.parent.name, run.path.name)]
    if exact and (len(exact) == 1 or exact[0].path.parent.name == spec):
        return exact[0]
    matches = exact or [run for run in runs if run.name.startswith(spec)]
    if matches and "/" not in spec and len({run.path.parent for run in matches}) == 1 and not exact:
        return matches[0]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.name for run in matches[:5]) + (" ..." if len(matches) > 5 else "")
        raise RunDirectoryError(f"{clean_text(spec, 200)!r} is not one run; it could be {names}")
    close = difflib.get_close_matches(
        spec, [run.name for run in runs] + [run.path.parent.name for run in runs], n=1
    )
    hint = f"\n  hint: did you mean {close[0]}?" if close else ""
    raise RunDirectoryError(f"no such run: {clean_text(spec, 200)} in {root}{hint}")


def _touch(path: Path) -> float:
    """Set the time of a file to now, by the clock of its file system, and return it. Raises
    OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        os.utime(descriptor)
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _claim(hidden: Path, parent: Path) -> Path:
    """Rename a complete directory to the next free number. Renaming onto a directory that is not
    empty fails.
    """
    day = datetime.date.today().isoformat()
    taken = [
        int(name.rsplit("-", 1)[1])
        for name in os.listdir(parent)
        if re.fullmatch(rf"{day}-\d+", name)
    ]
    number = max(taken, default=0)
    while True:
        number += 1
        path = parent / f"{day}-{number:02d}"
        try:
            os.rename(hidden, path)
            return path
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def _folders(path: Path) -> list[Path]:
    try:
        return [
            path / name
            for name in os.listdir(path)
            if not name.startswith(".") and (path / name).is_dir()
        ]
    except OSError:
        return []


def _started(path: Path) -> float:
    """config.toml is written when a run begins; ties are settled by the name."""
    try:
        return (path / "config.toml").stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        fields = msgspec.json.decode(read_file(path))
        if kind is Status:
            fields = _with_present_disk(fields)
        found = msgspec.convert(fields, kind, strict=False)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    numbers = [value for value in msgspec.structs.astuple(found) if isinstance(value, int)]
    # JSON has numbers of any length
    return found if all(abs(number) < 2**63 for number in numbers) else None


def _with_present_disk(fields: Any) -> Any:
    """Return the fields of a status, with the present name and word of its field `durability`."""
    if not isinstance(fields, dict) or not isinstance(old := fields.get("durability"), str):
        return fields
    return {"disk": old.replace("degraded", "failing", 1)} | fields
