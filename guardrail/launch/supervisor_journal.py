"""What the supervisor writes into a run directory: its events, the status while no rank writes one,
the last word.

A disk that takes nothing must not end the training, so a failed write is told to supervisor.log and
passed over.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import ExitCode
from guardrail.core.files import open_file
from guardrail.core.format import format_plural
from guardrail.core.records import Mode, Phase, Status
from guardrail.core.sections import LaunchSection
from guardrail.core.text import clean_text
from guardrail.rundir.journal import EXIT_CODES, last_turn, outcome_of
from guardrail.rundir.run_directory import RunDirectory

STDOUT = 1
TAIL_LINES = 12
# Lines of supervisor.log that a full disk has not taken, oldest first; of very many the newest.
_unwritten: deque[bytes] = deque(maxlen=1000)
_writing = threading.Lock()  # held by the thread that changes `_unwritten`


class SupervisorJournal:
    """The supervisor's pen. On other nodes than the first it writes events only."""

    def __init__(self, run: RunDirectory, launch: LaunchSection, host: str, mode: Mode) -> None:
        self._run, self._launch, self._host, self._mode = run, launch, host, mode
        self._leads = launch.node_rank == 0
        self._began = time.time()
        # What stood there before us: the time of an event or a status may come from another host's
        # clock.
        self._last_event = max((event.seq for event in run.events()), default=0)
        self._last_status = run.read_status()
        self._written = -1.0  # time.monotonic() of our last status

    def record(self, kind: str, message: str, **data: Any) -> bool:
        """Append to the journal at the run's present step; False when the disk does not take it."""
        log(f"{kind}: {message}")
        status = self._run.read_status()
        step, timeline = (status.step, status.timeline) if status else (0, 0)
        try:
            self._run.append(kind, message, step=step, timeline=timeline, **data)
        except OSError as error:
            log(f"the journal cannot be written: {error}")
            return False
        return True

    def starting(self, *, restarts: int) -> None:
        """Keep the status fresh while ranks are started; at most once a second."""
        if self._leads and time.monotonic() - self._written >= 1.0:
            again = f", restart {restarts} of {self._launch.max_restarts}" if restarts else ""
            nodes = f" on each of {self._launch.nodes} nodes" if self._launch.nodes > 1 else ""
            progress = f"starting {format_plural(self._launch.processes, 'process')}{nodes}{again}"
            last = self._run.read_status()
            # What the processes before held in memory is gone with them, and so is their speed.
            on_disk = tuple(one for one in (last.snapshots if last else ()) if one.tier != "memory")
            self._replace(
                phase=Phase.STARTING,
                progress=progress,
                restarts=restarts,
                question="",
                deadline=0.0,
                pid=0,
                tokens_per_second=0.0,
                eta_seconds=0.0,
                snapshots=on_disk,
            )

    def ended(self, phase: Phase, exit_code: ExitCode, reason: str, last_lines: list[str]) -> None:
        """The journal's last line, unless rank 0 has written it (then `reason` is "")."""
        if not reason:
            log(f"{phase.value}, exit code {exit_code.value}")
        elif self._leads:
            message = "\n".join([f"{phase.value}: {reason}", *last_lines])
            self.record(
                "ended", message, phase=phase.value, exit_code=exit_code.value, reason=reason
            )

    def final_status(
        self, phase: Phase, exit_code: ExitCode, *, restarts: int, unwritable: str = ""
    ) -> None:
        """The status that stays. `unwritable`: why the run directory could not be written, "" if it
        could.
        """
        if self._leads:
            changes = {"disk": f"failing: {unwritable}"} if unwritable else {}
            self._replace(
                phase=phase, progress="", exit_code=exit_code.value, restarts=restarts, **changes
            )

    def last_word_of_ranks(self, pids: Collection[int]) -> tuple[Phase, ExitCode] | None:
        """How rank 0 ended the run, if it did so since this supervisor began.

        The journal says it; where a full disk has kept it out, the status does if it is of one of
        `pids` or of another host: a status that an earlier incarnation left behind is no answer.
        """
        last = last_turn(self._run.events())
        if last is not None and last.kind == "ended" and last.seq > self._last_event:
            if (said := outcome_of(last)) is not None:
                return said
        status = self._run.read_status()
        if status is None or not status.phase.ended or status == self._last_status:
            return None
        if status.host == self._host and status.pid not in pids:
            return None
        return status.phase, EXIT_CODES[status.phase]

    def _replace(self, *, phase: Phase, **changes: Any) -> None:
        last = self._run.read_status() or Status(
            run="", phase=phase, started=self._began, mode=self._mode
        )
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
        self._written = time.monotonic()
        write = self._run.write_last_status if phase.ended else self._run.write_status
        with contextlib.suppress(OSError):  # the next one, or a rank's, will get through
            write(status)


def log(line: str) -> None:
    """A line for logs/supervisor.log, which is our stdout. What a full disk does not take is kept
    for `flush_log`.
    """
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
    with _writing:
        _unwritten.append(text.encode("utf-8", "backslashreplace"))
    flush_log()


def flush_log() -> None:
    """Write the lines that are not written yet. Not by `print`, which keeps or drops what a write
    has not taken.

    The notifier and the supervisor log from two threads: one of them at a time writes.
    """
    with _writing, contextlib.suppress(OSError):
        while _unwritten:
            data = _unwritten[0]
            _unwritten[0] = data[os.write(STDOUT, data) :]
            if not _unwritten[0]:
                _unwritten.popleft()


def tail(file: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, made safe for a screen."""
    try:
        with open_file(file) as opened:
            opened.seek(max(0, file.stat().st_size - 16 * 1024))
            text = opened.read()
    except OSError:
        return []
    return [clean_text(line, 300) for line in text.splitlines()[-lines:]]
