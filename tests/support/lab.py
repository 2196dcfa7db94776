"""A place where tests run the real command line, supervisor and ranks, and end whatever they
started.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from guardrail.rundir import processes
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_search import list_runs
from tests.support.places import ROOT

FAKES = Path(__file__).parent / "fakes"


def wait_for(condition: Callable[[], object], *, seconds: float = 60.0, what: str = "") -> None:
    """Poll until `condition` holds; fails the test after `seconds`, which only a broken program
    needs.

    What it looks at may not be there yet: an assertion in it that does not hold counts as False.
    """
    deadline = time.monotonic() + seconds
    missing: AssertionError | None = None
    while True:
        try:
            if condition():
                return
        except AssertionError as error:
            missing = error
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen within {seconds:g} s: {what or condition} {missing or ''}")
        time.sleep(0.02)


@contextlib.contextmanager
def small_file_system(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system of its own at `folder`; skips the test where none may be mounted."""
    folder.mkdir()
    size = f"size={megabytes}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here; the other tests stage the errors")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    """Leave `leave` bytes free."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while shutil.disk_usage(disk).free > leave:
                file.write(b"\0" * min(65536, shutil.disk_usage(disk).free - leave))
        except OSError as error:
            assert error.errno == errno.ENOSPC


class Lab:
    """A folder with runs, the command line, and the end of every process that was started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "runs"
        self._started: list[subprocess.Popen[str]] = []

    def environment(self, **variables: str) -> dict[str, str]:
        paths = os.pathsep.join([str(FAKES), str(ROOT)])
        return {**os.environ, "PYTHONPATH": paths, "GUARDRAIL_ROOT": str(self.root), **variables}

    def write_config(self, more: str, *, name: str = "fake") -> str:
        """Write a configuration of the fake trainer on CPU; return the name of the file.

        Args:
            more: further keys of [launch], and then further sections.
            name: of the run.
        """
        head = f'[run]\nname = "{name}"\n[launch]\ntrainer = "faketrainer"\ndevice = "cpu"\n'
        (self.folder / "c.toml").write_text(head + more)
        return "c.toml"

    def guardrail(
        self, *arguments: str, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "guardrail", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command and go on."""
        process = subprocess.Popen(
            [sys.executable, "-m", "guardrail", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def newest(self) -> RunDirectory:
        wait_for(lambda: list_runs(self.root), what="a run directory")
        return list_runs(self.root)[0]

    def supervisor(self, run: RunDirectory) -> psutil.Process:
        """The live supervisor of a run."""
        found: list[psutil.Process] = []

        def look() -> bool:
            status = run.read_status()
            process = processes.supervisor_of(run.path, status.supervisor_pid) if status else None
            found.extend([process] if process else [])
            return bool(found)

        wait_for(look, what="a supervisor")
        return found[0]

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
        for run in list_runs(self.root):
            status = run.read_status()
            supervisor = (
                processes.supervisor_of(run.path, status.supervisor_pid) if status else None
            )
            if supervisor is not None:
                processes.send_signal(supervisor, signal.SIGQUIT)
                wait_for(lambda alive=supervisor: not processes.alive(alive), seconds=20)  # type: ignore[misc]
            processes.kill(processes.processes_of(run.path))


class Waited(BaseException):
    """What was called has waited for a writer."""


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Raises Waited in what takes longer than 5 seconds."""

    def give_up(*_: object) -> None:
        raise Waited

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
