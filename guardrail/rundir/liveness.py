"""Whether somebody works on a run, on whatever host. No run is called dead because of a clock:
those of two hosts may differ by minutes.

What counts is that the heartbeat in status.json, which is written once a second, changes between
two looks. The second look is spared where heartbeat and file are both seconds old by our own clock.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from guardrail.core.records import Status
from guardrail.rundir.run_directory import RunDirectory

# a run that lives is seen to change within this time, on a slow file system too
FIRST_SECONDS = 5.0
FRESH_SECONDS = 30.0  # one that was seen to change, and has not for this long, has ended or hangs
# a status that was replaced longer ago, by the file system's clock, needs no second look
OLD_SECONDS = 86_400.0


@dataclass
class _Seen:
    heartbeat: float
    when: float
    changed: bool = False


class HeartbeatObserver:
    """Remembers when the heartbeat of each run was last seen to change.

    Args:
        clock: of the viewer, in seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self, run: RunDirectory, status: Status) -> bool | None:
        """Whether the run lives; None while that takes another look. Never waits."""
        if (known := _known(run, status)) is not None:
            return known
        now, path = self._clock(), str(run.path)
        seen = self._seen.get(path)
        if seen is None:
            self._seen[path] = _Seen(status.heartbeat, now)
            return None
        if seen.heartbeat != status.heartbeat:
            self._seen[path] = _Seen(status.heartbeat, now, changed=True)
            return True
        waited = now - seen.when
        if seen.changed:
            return waited < FRESH_SECONDS
        return None if waited < FIRST_SECONDS else False

    def __call__(self, run: RunDirectory, status: Status) -> bool:
        """Whether the run lives, as far as that is known now; one that was not looked at twice may
        live.
        """
        return self.look(run, status) is not False

    def listed(self, run: RunDirectory, status: Status) -> bool | None:
        """As `look`, for a list of many runs: one whose status is a day old is not waited for."""
        if (
            status.host != socket.gethostname()
            and str(run.path) not in self._seen
            and _file_age(run) >= OLD_SECONDS
        ):
            self._seen[str(run.path)] = _Seen(status.heartbeat, self._clock() - FIRST_SECONDS)
        return self.look(run, status)


def is_alive(run: RunDirectory, status: Status) -> bool:
    """Somebody works on this run: its supervisor, or ranks that outlived it, here or on another
    host.

    Waits up to FIRST_SECONDS for the next heartbeat of a run on another host.
    """
    observer = HeartbeatObserver()
    while (answer := observer.look(run, status)) is None:
        time.sleep(0.1)
        status = run.read_status() or status
    return answer


def _known(run: RunDirectory, status: Status) -> bool | None:
    """What needs no second look: processes and locks are asked, not files. None: the heartbeat
    decides.
    """
    is_here = status.host == socket.gethostname()
    if is_here:
        from guardrail.rundir.processes import supervisor_of

        if supervisor_of(run.path, status.supervisor_pid) is not None:
            return True
    if status.phase.ended:
        return False
    if run.lock_holder() is not None:
        return True
    age = abs(time.time() - status.heartbeat)
    if is_here:
        return age < FRESH_SECONDS
    return True if age < FRESH_SECONDS and abs(_file_age(run)) < FRESH_SECONDS else None


def _file_age(run: RunDirectory) -> float:
    """Seconds since the status was replaced, by the clock of its file system."""
    try:
        return time.time() - os.stat(run.path / "status.json").st_mtime
    except OSError:
        return OLD_SECONDS
