"""The supervisor as a process: start it, and read its exit code."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import Any

import msgspec

from guardrail.core.errors import ExitCode, RunDirectoryError, WorkersFailed
from guardrail.core.text import clean_text
from guardrail.rundir import processes
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import holder_of

START_SECONDS = 30.0  # until the supervisor reports; it needs 0.2 on an idle machine


class StartInterrupted(KeyboardInterrupt):
    """Ctrl-C while the supervisor starts. It has its own session, so it continues."""


def start_supervisor(
    run: RunDirectory, node_rank: int = 0, secrets: dict[str, Any] | None = None
) -> subprocess.Popen[bytes]:
    """Start the supervisor in its own session, and wait until it has started.

    Args:
        secrets: of [notify], that the run directory does not hold. They go through a pipe, so no
            command line, environment or file holds them.

    Raises:
        StartInterrupted: Ctrl-C; the supervisor runs.
        WorkersFailed: the supervisor ended before it started.
        RunDirectoryError: it refused the run directory.
        DiskRefuses: the run directory takes no file.
    """
    run.check_writable()
    variables = dict(os.environ)
    if secrets:
        variables[processes.SECRETS_VARIABLE] = "stdin"
    # The working directory of the supervisor is /, so that it keeps no folder in use. Relative paths
    # of packages are made absolute for it.
    given = variables.get("PYTHONPATH", "").split(os.pathsep)
    paths = [os.path.abspath(path) for path in given if path]
    here = os.getcwd()
    if here in sys.path and here not in paths:
        paths.append(here)
    if paths:
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    log_path = run.logs / "supervisor.log"
    if node_rank:
        log_path = run.logs / f"supervisor-{node_rank}.log"
    offset = log_path.stat().st_size if log_path.exists() else 0
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                processes.SUPERVISOR_MODULE,
                str(run.path.resolve()),
                str(node_rank),
            ],
            stdin=subprocess.PIPE if secrets else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=variables,
            start_new_session=True,
        )
    if process.stdin is not None:
        # A supervisor that has ended wrote the reason into its log.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(msgspec.json.encode(secrets))

    def has_started() -> bool:
        if node_rank:  # only the first node writes the status
            holder = holder_of(run.path / f"supervisor-{node_rank}.lock")
            return holder is not None and holder.pid == process.pid
        status = run.read_status()
        return status is not None and status.supervisor_pid == process.pid

    deadline = time.monotonic() + START_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if has_started():
                return process
            time.sleep(0.02)
    except KeyboardInterrupt:
        raise StartInterrupted from None
    if process.poll() is None or has_started():
        return process  # a very slow machine, or a very short run
    last_lines = [
        clean_text(line, 500) for line in log_path.read_bytes()[offset:].splitlines()[-12:]
    ]
    run.check_writable()  # on a full disk the log cannot hold the reason
    if process.returncode == ExitCode.USAGE:
        raise RunDirectoryError("\n".join(last_lines))
    raise WorkersFailed("the supervisor did not start:\n" + "\n".join(last_lines))


def find_exit_code(supervisor: subprocess.Popen[bytes]) -> int | None:
    """Return the run's exit code once its supervisor has ended, else None."""
    code = supervisor.poll()
    if code is None or code >= 0:
        return code
    return ExitCode.WORKERS_FAILED  # the supervisor itself was killed


def format_way_back(run: RunDirectory) -> str:
    """Return the commands to watch and to stop a run that continues."""
    return f"  guardrail attach {run.path}\n  guardrail ctl {run.path} stop"
