"""A run directory: all data of a run, and the only channel between its processes.

Writers only append lines or replace files atomically. So a reader on any machine finds a consistent
state, also after a crash. Only this class and its parts read or write the files:

    run_creation, run_search   make a run; find runs
    journal, metrics           events; rows of numbers
    command_files              waiting commands
    status_files, screen_files status, ranks, attached screens
    run_lock                   one trainer per run

The module imports neither torch nor, at module level, numpy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from guardrail.core import secret
from guardrail.core.errors import DiskRefuses, RunDirectoryError
from guardrail.core.events.event import Event
from guardrail.core.events.kinds import make_event, with_data
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.files import (
    FOLDER_MODE,
    read_file,
    replace_file,
    why_unwritable,
)
from guardrail.core.records.commands import Command
from guardrail.core.records.status import NodeStatus, RankStatus, Status
from guardrail.core.section import Section
from guardrail.decide.timelines import TimelineIndex
from guardrail.rundir import journal, run_creation, screen_files, status_files
from guardrail.rundir.command_files import (
    Inbox,
    Refusal,
    check_command,
    find_interrupted,
    make_answer,
)
from guardrail.rundir.metrics import MetricsView, MetricsWriter, read_metrics, read_rows
from guardrail.rundir.run_lock import Holder, RunLock, holder_of

if TYPE_CHECKING:
    import numpy as np


class RunDirectory:
    """One run on disk. `open` and `create` check the folder; the constructor does not."""

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
        # whether the commands that an earlier trainer answered, but did not remove, are removed
        self._recovered = False
        self.commands_problem = ""  # why the last read of commands/ failed; "": it did not

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Return NAME/YYYY-MM-DD-NN."""
        return f"{self.path.parent.name}/{self.path.name}"

    @classmethod
    def create(
        cls, root: str | os.PathLike[str], name: str, config_toml: str | Section = ""
    ) -> RunDirectory:
        """Make ROOT/NAME/YYYY-MM-DD-NN, on rank 0 alone; `open(path)` on others and to continue.

        Args:
            root: folder of all runs; made if it is missing.
            name: 1 to 100 letters, digits, and . _ + = @ - inside.
            config_toml: a `GuardConfig` or TOML text, stored as config.toml; "": the defaults. The
                guard does not read it: also give it to `Guard(config=...)`.

        Raises UsageError: an argument has a wrong type, or the folder cannot be made.
        """
        return cls(run_creation.create_numbered(root, name, config_toml))

    @classmethod
    def create_at(cls, path: Path, config_toml: str) -> RunDirectory:
        """Make a run directory at exactly this path. Raises RunDirectoryError."""
        run_creation.create_at(path, config_toml)
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Return an existing run. Raises RunDirectoryError if the folder is no run or unreadable."""
        where = Path(path).absolute()
        run_creation.check_is_run(where)
        return cls(where)

    # -- configuration and status

    def config_text(self, *, display: bool = False) -> str:
        """Return the resolved configuration as TOML, without secrets. Raises RunDirectoryError.

        Args:
            display: for a screen or a report. Values whose key looks like a secret are masked too.
        """
        try:
            text = read_file(self.path / "config.toml").decode("utf-8")
            return secret.mask_text(text, display=display)  # older versions wrote secrets
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise RunDirectoryError(f"{self.path / 'config.toml'}: {reason}") from error

    def write_config(self, text: str) -> None:
        replace_file(self.path / "config.toml", secret.mask_text(text).encode("utf-8"))

    def read_status(self) -> Status | None:
        """Return the status; None: there is none, or this version cannot read it."""
        return status_files.read_status(self.path / "status.json")

    def known_status(self) -> Status | None:
        """Return the status; without one, a status of how the run ended, from the journal."""
        if (status := self.read_status()) is not None:
            return status
        try:
            return self.status_of_end(self.events())
        except OSError:
            return None

    def status_of_end(self, events: Sequence[Event]) -> Status | None:
        """Return a status made from the last events of a run; None: the run has not ended."""
        return status_files.status_of_end(self.name, events)

    def write_status(self, status: Status) -> None:
        """Replace status.json. Raises OSError.

        It is not synced, since it is replaced again a second later.
        """
        status_files.write_status(self.path / "status.json", status)

    def write_last_status(self, status: Status) -> None:
        """Replace status.json as `write_status` does. Raises OSError.

        If the disk has no room for a second file, the existing file is overwritten.
        """
        status_files.write_last_status(self.path / "status.json", status)

    def check_writable(self) -> None:
        """Raise DiskRefuses if no file can be written here."""
        if why := why_unwritable(self.path):
            raise DiskRefuses(self.path, why)

    def read_ranks(self) -> list[RankStatus]:
        """Return the last report of each rank, by rank."""
        return status_files.read_rank_reports(self._ranks)

    def write_node(self, status: NodeStatus) -> None:
        """Replace the reports of one node's ranks. Raises OSError."""
        status_files.write_node(self._ranks, status)

    def write_rank(self, status: RankStatus) -> None:
        """Write the report of one rank, if the node's local disk fails. Raises OSError."""
        status_files.write_rank(self._ranks, status)

    def remove_ranks(self) -> None:
        """Remove the reports of an earlier start, before the next ranks are started."""
        status_files.remove_rank_reports(self._ranks)

    # -- notifications

    def notified(self) -> int | None:
        """Return the seq of the newest event with a notification; None: none was recorded yet."""
        return status_files.read_notified(self.path / "notified")

    def write_notified(self, seq: int) -> None:
        """Record that seq and sync it. Raises OSError."""
        replace_file(self.path / "notified", f"{seq}\n".encode())

    # -- the one trainer

    def lock(self, who: str) -> RunLock:
        """Become the only trainer of the run.

        The lock lasts until it is released or this process ends in any way.

        Raises:
            RunDirectoryError: another process holds the lock; the message names it.
        """
        return RunLock(self.path / "run.lock", who)

    def lock_holder(self) -> Holder | None:
        """Return the running trainer, or None."""
        return holder_of(self.path / "run.lock")

    # -- the journal

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def write_event(self, event: Event) -> Event:
        """Write one event and sync it. Any process of the run may do so, at any time.

        Args:
            event: built from its fields. Its time is now unless it has one.

        Returns:
            The event with its number, its time and its sentence.

        Raises:
            OSError: the event is not on disk, not even in part.
        """
        if not event.time:
            event = msgspec.structs.replace(event, time=time.time())
        return journal.append_event(self.journal_path, with_data(event))

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
        """Write one event of any kind from its fields as they stand on disk; see `write_event`.

        For the loops of users, who write notes. Guardrail itself writes event objects.

        Args:
            happened: wall time of the event, seconds since the epoch; None: now.
        """
        at = time.time() if happened is None else happened
        event = Event(time=at, step=step, timeline=timeline, kind=kind, message=message, data=data)
        return make_event(journal.append_event(self.journal_path, event).all_fields())

    def events(self, after: int = 0) -> list[Event]:
        """Return the events with seq > `after`, oldest first.

        An incomplete last line and unknown fields are ignored.
        """
        return journal.read_events(self.journal_path, after=after)

    # -- metrics

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.bin"

    def metrics_writer(self, further: Sequence[str] = ()) -> MetricsWriter:
        """Return a writer of metric rows, for the holder of the lock. Raises OSError.

        A new run gets the `further` columns in addition to the usual ones.
        """
        return MetricsWriter(self.metrics_path, self.path / "metrics.json", further=further)

    def metrics(self, columns: Sequence[str] | None = None) -> MetricsView:
        """Return the rows that are complete now; empty while there are none."""

        def timelines() -> TimelineIndex:
            known = TimelineIndex()
            known.add_events(self.events())
            return known

        return read_metrics(
            self.metrics_path, self.path / "metrics.json", columns=columns, timelines=timelines
        )

    def rows(self, first: int, end: int) -> tuple[tuple[str, ...], np.ndarray]:
        """Return (columns, rows [first, end) of the metrics).

        They are read and not mapped, so a file that is cut meanwhile does no harm.
        """
        return read_rows(self.metrics_path, self.path / "metrics.json", first, end)

    # -- commands

    @property
    def inbox(self) -> Inbox:
        if self._inbox is None:
            self._inbox = Inbox(self.commands, owner=self.path.stat().st_uid)
        return self._inbox

    def send(self, command: Command) -> None:
        """Send a command to the run. The answer is a `command` event with the same id.

        Raises:
            RunDirectoryError: the command is invalid, or another user owns the run.
            OSError: the file cannot be written.
        """
        reason = check_command(command)
        if reason is not None:
            raise RunDirectoryError(reason, kind="wrong_command")
        if os.geteuid() != self.path.stat().st_uid:
            reason = f"{self.path}: not your run; only its owner may send commands"
            raise RunDirectoryError(reason, kind="other_owner")
        self._folder(self.commands)
        self.inbox.send(command)

    def commands_pending(self) -> list[Command]:
        """Return the commands that wait for an answer, oldest first. Never raises.

        `commands_refused` returns the other files.
        """
        return self.commands_waiting()[0]

    def commands_refused(self) -> list[Refusal]:
        """Return the files in commands/ that are not valid commands; each needs an answer too.

        They are damaged, of another user, or their value is out of range.
        """
        return self.commands_waiting()[1]

    def commands_waiting(self) -> tuple[list[Command], list[Refusal]]:
        """Return both, from one read of the folder.

        Never raises because of its files; `commands_problem` holds the error.
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
        """Journal the answer to a command, then remove its file.

        Raises:
            OSError: the answer is not in the journal; the file is kept.
        """
        line = make_answer(to, applied=applied, reason=reason)
        event = self.write_event(msgspec.structs.replace(line, step=step, timeline=timeline))
        self.command_done(to.id)
        return event

    def _pending(self) -> tuple[list[Command], list[Refusal]]:
        commands, refusals = self.inbox.scan()
        if not self._recovered and (commands or refusals):
            # A crash may come between an answer and the removal of the command's file. That command
            # must not be executed twice. One that was answered but not executed is due at the step
            # that its answer names.
            events = self.events()
            self._undone = find_interrupted(events)
            answered = {event.id for event in events if isinstance(event, CommandAnswered)}
            answered -= set(self._undone)
            for id in {item.id for item in commands} | {item.id for item in refusals}:
                if id in answered:
                    self.inbox.remove(id)
            commands, refusals = self.inbox.scan()
        self._recovered = True
        return [self._due(command) for command in commands], refusals

    def _due(self, command: Command) -> Command:
        if command.id not in self._undone:
            return command
        # Its preview was valid when it was accepted, and the question of that time ended with the
        # process.
        at_step = max(command.at_step, self._undone[command.id])
        return msgspec.structs.replace(command, at_step=at_step, question=None, shown=None)

    # -- screens

    def screen_seen(self) -> None:
        """Record that this process shows the run. Call it every few seconds."""
        screen_files.mark_seen(self._screens)

    def screen_gone(self) -> None:
        screen_files.mark_gone(self._screens)

    def screens(self) -> int:
        """Count the screens that were seen in the last 15 seconds."""
        return screen_files.count_screens(self._screens)

    def _folder(self, path: Path) -> None:
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
