"""Which processes belong to a run, and how they are ended. A pid is believed only with its command
line or environment, because pids are used again.
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
    """Running, and not a zombie that waits for a parent which does not reap."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def supervisor_of(run: Path, pid: int) -> psutil.Process | None:
    """The live process `pid` if it is the supervisor of `run`, else None."""
    try:
        process = psutil.Process(pid)
        arguments = process.cmdline()
    except (psutil.Error, ValueError):
        return None
    ours = SUPERVISOR_MODULE in arguments and str(run.resolve()) in arguments
    return process if ours and alive(process) else None


def processes_of(run: Path) -> list[psutil.Process]:
    """Every live process of this user that was started for `run`: elastic agents, ranks and their
    children.

    A supervisor is not among them: it gives the variable to others only.
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
            continue  # another user's, or gone
    return found


def orphans_of(run: Path) -> list[psutil.Process]:
    """Those of them whose supervisor is dead. Another node's supervisor may stand on this host and
    be alive.
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


def tell(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone (psutil refuses a pid that was used again)."""
    try:
        process.send_signal(number)
        return True
    except psutil.Error:
        return False


def kill(processes: Iterable[psutil.Process], *, seconds: float = 10.0) -> list[psutil.Process]:
    """SIGKILL all and wait until they are gone; returns those that the kernel could not end in
    `seconds`.
    """
    victims = list(processes)
    for process in victims:
        tell(process, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while (
        left := [process for process in victims if alive(process)]
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in victims:
        reap(process)
    return left


def reap(process: psutil.Process) -> None:
    """Take the exit status of a dead child; nothing happens for another's child or a live one."""
    with contextlib.suppress(psutil.Error, psutil.TimeoutExpired):
        process.wait(0)


def cores() -> int:
    """CPU cores that this process may use: affinity, and the quota of its control group (version
    2).
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
