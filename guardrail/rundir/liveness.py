"""Find out whether a run is alive, on this host or another one.

The clocks of two hosts may differ by minutes, so a clock alone never makes a run dead. status.json
is written once a second. A run is alive if the heartbeat in it changes between two reads. One read
is enough if heartbeat and file are both at most FRESH_SECONDS old by the local clock.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from guardrail.core.records.status import Status
from guardrail.rundir.run_directory import RunDirectory

# a live run changes within this time, also on a slow file system
FIRST_SECONDS = 5.0
FRESH_SECONDS = 30.0  # a run whose last change is longer ago has ended or hangs
# a status that is older by the file system's clock needs no second read
OLD_SECONDS = 86_400.0


@dataclass
class _Seen:
    heartbeat: float
    when: float
    changed: bool = False


class HeartbeatObserver:
    """Records when the heartbeat of each run last changed.

    Args:
        clock: of the viewer, in seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self, run: RunDirectory, status: Status) -> bool | None:
        """Return whether the run is alive; None: another read is needed. Never waits."""
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
        """Return whether the run may be alive.

        True also for a run that was read only once.
        """
        return self.look(run, status) is not False

    def listed(self, run: RunDirectory, status: Status) -> bool | None:
        """Return the same as `look`, but False at once for a status that is a day old.

        For lists of many runs.
        """
        if (
            status.host != socket.gethostname()
            and str(run.path) not in self._seen
            and _file_age(run) >= OLD_SECONDS
        ):
            self._seen[str(run.path)] = _Seen(status.heartbeat, self._clock() - FIRST_SECONDS)
        return self.look(run, status)


def is_alive(run: RunDirectory, status: Status) -> bool:
    """Return whether the run is alive, on this host or another one.

    It is alive if its supervisor runs, or ranks that outlived it. Waits up to FIRST_SECONDS for the
    next heartbeat of a run on another host.
    """
    observer = HeartbeatObserver()
    while (answer := observer.look(run, status)) is None:
        time.sleep(0.1)
        status = run.read_status() or status
    return answer


def _known(run: RunDirectory, status: Status) -> bool | None:
    """Return whether the run is alive, if one read is enough; None: the heartbeat decides.

    It checks the processes, the phase, the lock and the age of the heartbeat.
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
    """Return the seconds since the status was replaced, by the clock of its file system."""
    try:
        return time.time() - os.stat(run.path / "status.json").st_mtime
    except OSError:
        return OLD_SECONDS
