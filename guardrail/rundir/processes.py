"""Find the processes of a run, and end them.

Systems reuse pids. So a pid counts only if the command line or the environment of the process names
the run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

# path of the run directory, in the environment of the elastic agent and every rank
RUN_VARIABLE = "GUARDRAIL_RUN"
SUPERVISOR_VARIABLE = "GUARDRAIL_SUPERVISOR_PID"
# "stdin": the supervisor reads the secrets of [notify] from its standard input
SECRETS_VARIABLE = "GUARDRAIL_SECRETS"
# restarts before this elastic agent; it counts its own from 0
INCARNATION_VARIABLE = "GUARDRAIL_INCARNATION"
SUPERVISOR_MODULE = "guardrail.launch.supervisor"


def alive(process: psutil.Process) -> bool:
    """Return whether the process is running and not a zombie, which waits to be reaped."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def supervisor_of(run: Path, pid: int) -> psutil.Process | None:
    """Return the live process `pid` if it is the supervisor of `run`, else None."""
    try:
        process = psutil.Process(pid)
        arguments = process.cmdline()
    except (psutil.Error, ValueError):
        return None
    ours = SUPERVISOR_MODULE in arguments and str(run.resolve()) in arguments
    return process if ours and alive(process) else None


def processes_of(run: Path) -> list[psutil.Process]:
    """Return each live process of this user that was started for `run`.

    These are elastic agents, ranks and their children. A supervisor is not one of them: it does not
    have the variable itself.
    """
    found, path = [], str(run.resolve())
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.environ().get(RUN_VARIABLE) == path
                and alive(process)
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # of another user, or ended
    return found


def orphans_of(run: Path) -> list[psutil.Process]:
    """Return the processes of `run` whose supervisor is dead.

    Another node's supervisor may run on the same host and be alive.
    """
    found = []
    for process in processes_of(run):
        try:
            supervisor = int(process.environ().get(SUPERVISOR_VARIABLE, "0"))
        except (psutil.Error, OSError, ValueError):
            continue
        if supervisor_of(run, supervisor) is None:
            found.append(process)
    return found


def send_signal(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; return False if the process has ended. psutil refuses a reused pid."""
    try:
        process.send_signal(number)
        return True
    except psutil.Error:
        return False


def kill(processes: Iterable[psutil.Process], *, seconds: float = 10.0) -> list[psutil.Process]:
    """Send SIGKILL to all and wait until they have ended.

    Returns those that the kernel could not end in `seconds`.
    """
    victims = list(processes)
    for process in victims:
        send_signal(process, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while (
        left := [process for process in victims if alive(process)]
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in victims:
        reap(process)
    return left


def reap(process: psutil.Process) -> None:
    """Read the exit status of a dead child. Does nothing for a live one or a child of others."""
    with contextlib.suppress(psutil.Error, psutil.TimeoutExpired):
        process.wait(0)


def cores() -> int:
    """Return the number of CPU cores that this process may use.

    It is limited by the affinity and by the quota of its control group (version 2).
    """
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return count
