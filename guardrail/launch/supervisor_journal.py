"""What the supervisor writes into a run directory: its events, the status while no rank writes one,
and the last line and status.

A full disk must not end the training. A write that fails is noted in supervisor.log, and the
supervisor continues.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import ExitCode
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Ended
from guardrail.core.files import open_file
from guardrail.core.format import format_plural
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import LaunchSection
from guardrail.core.text import clean_text
from guardrail.rundir.journal import EXIT_CODES, last_turn, outcome_of
from guardrail.rundir.run_directory import RunDirectory

STDOUT = 1
LAST_LINES = 12
# Lines of supervisor.log that a full disk has not taken, oldest first. Beyond 1,000 the oldest go.
_unwritten: deque[bytes] = deque(maxlen=1000)
_writing = threading.Lock()  # held by the thread that changes `_unwritten`


class SupervisorJournal:
    """Writes for one supervisor. Those of further nodes write events only."""

    def __init__(self, run: RunDirectory, launch: LaunchSection, host: str, mode: Mode) -> None:
        self._run, self._launch, self._host, self._mode = run, launch, host, mode
        self._is_first_node = launch.node_rank == 0
        self._began = time.time()
        # The last event and status from before this supervisor. Not compared by time: they may come
        # from another host's clock.
        self._last_event = max((event.seq for event in run.events()), default=0)
        self._last_status = run.read_status()
        self._status_written = -1.0  # time.monotonic() of the last status

    def record(self, event: Event) -> bool:
        """Append to the journal at the run's present step. False if the disk does not take it."""
        log(f"{event.kind}: {event.sentence()}")
        status = self._run.read_status()
        if status is not None:
            event = msgspec.structs.replace(event, step=status.step, timeline=status.timeline)
        try:
            self._run.write_event(event)
        except OSError as error:
            log(f"the journal cannot be written: {error}")
            return False
        return True

    def write_starting_status(self, *, restarts: int) -> None:
        """Keep the status fresh while ranks start; at most once a second, on the first node."""
        if not self._is_first_node or time.monotonic() - self._status_written < 1.0:
            return
        progress = f"starting {format_plural(self._launch.processes, 'process')}"
        if self._launch.nodes > 1:
            progress += f" on each of {self._launch.nodes} nodes"
        if restarts:
            progress += f", restart {restarts} of {self._launch.max_restarts}"
        last = self._run.read_status()
        snapshots = last.snapshots if last else ()
        self._replace_status(
            phase=Phase.STARTING,
            progress=progress,
            restarts=restarts,
            question="",
            deadline=0.0,
            pid=0,
            # The memory of the earlier processes is gone, and their speed is no longer measured.
            tokens_per_second=0.0,
            eta_seconds=0.0,
            snapshots=tuple(one for one in snapshots if one.tier != "memory"),
        )

    def record_end(
        self, phase: Phase, exit_code: ExitCode, reason: str, last_lines: Sequence[str]
    ) -> None:
        """Write the journal's last line, unless rank 0 has written it (then `reason` is "")."""
        if not reason:
            log(f"{phase.value}, exit code {exit_code.value}")
        elif self._is_first_node:
            message = "\n".join([f"{phase.value}: {reason}", *last_lines])
            self.record(
                Ended(message=message, phase=phase.value, exit_code=exit_code.value, reason=reason)
            )

    def write_final_status(
        self, phase: Phase, exit_code: ExitCode, *, restarts: int, disk_refusal: str = ""
    ) -> None:
        """Write the status that stays, on the first node.

        Args:
            disk_refusal: why the run directory takes no file, "" if it does.
        """
        if not self._is_first_node:
            return
        changes = {}
        if disk_refusal:
            changes["disk"] = f"failing: {disk_refusal}"
        self._replace_status(
            phase=phase, progress="", exit_code=exit_code.value, restarts=restarts, **changes
        )

    def read_outcome_of_ranks(self, pids: Collection[int]) -> tuple[Phase, ExitCode] | None:
        """Return how rank 0 ended the run, if it has since this supervisor began.

        The journal holds it. Where a full disk has refused that line, the status holds it. A status
        of an earlier start does not count: it must come from one of `pids`, or from another host.
        """
        last = last_turn(self._run.events())
        if isinstance(last, Ended) and last.seq > self._last_event:
            outcome = outcome_of(last)
            if outcome is not None:
                return outcome
        status = self._run.read_status()
        if status is None or not status.phase.ended or status == self._last_status:
            return None
        if status.host == self._host and status.pid not in pids:
            return None
        return status.phase, EXIT_CODES[status.phase]

    def _replace_status(self, *, phase: Phase, **changes: Any) -> None:
        last = self._run.read_status()
        if last is None:
            last = Status(run="", phase=phase, started=self._began, mode=self._mode)
        status = msgspec.structs.replace(
            last,
            phase=phase,
            run=self._run.name,
            heartbeat=time.time(),
            host=self._host,
            supervisor_pid=os.getpid(),
            world=self._launch.processes * self._launch.nodes,
            **{"exit_code": None, **changes},
        )
        self._status_written = time.monotonic()
        write = self._run.write_last_status if phase.ended else self._run.write_status
        with contextlib.suppress(OSError):  # the next status is written in a second
            write(status)


def log(line: str) -> None:
    """Write a line to logs/supervisor.log, which is the standard output of this process.

    What a full disk does not take is kept for `flush_log`.
    """
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
    with _writing:
        _unwritten.append(text.encode("utf-8", "backslashreplace"))
    flush_log()


def flush_log() -> None:
    """Write the lines that are not written yet.

    Not by `print`: it keeps or drops what a write has not taken. The notifier and the supervisor
    log from two threads, so a lock lets one at a time write.
    """
    with _writing, contextlib.suppress(OSError):
        while _unwritten:
            data = _unwritten[0]
            _unwritten[0] = data[os.write(STDOUT, data) :]
            if not _unwritten[0]:
                _unwritten.popleft()


def read_last_lines(file: Path, lines: int = LAST_LINES) -> list[str]:
    """Return the last lines of a log, made safe for a terminal."""
    try:
        with open_file(file) as opened:
            opened.seek(max(0, file.stat().st_size - 16 * 1024))
            text = opened.read()
    except OSError:
        return []
    return [clean_text(line, 300) for line in text.splitlines()[-lines:]]
