"""The stacks of a hung rank's threads, read before it is killed."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from guardrail.core.files import read_file
from guardrail.rundir.local_ranks import LocalRanks

FAULTHANDLER_SECONDS = 2.0  # a process that can run at all writes its stacks within this
PY_SPY_SECONDS = 8.0
# The innermost frame of a thread, as faulthandler and as py-spy print it.
_FAULTHANDLER_FRAME = re.compile(
    r'[Tt]hread 0x[0-9a-f]+.*\(most recent call first\):\n  File "([^"]+)", line (\d+)'
)
_PY_SPY_FRAME = re.compile(r'"MainThread"\n +\S+ \(([^():]+):(\d+)\)')


def capture_stacks(logs: Path, ranks: LocalRanks, culprit: int) -> tuple[list[Path], str]:
    """Append the stacks of all local ranks to logs/rank-N.stacks.

    SIGUSR2 makes faulthandler write them (see `guardrail.rundir.stop_signals`). A process that is
    stopped, or that runs C++ only, does not answer. py-spy then reads the culprit from outside,
    where it is installed and allowed.

    Args:
        culprit: pid of the rank for which the others wait.

    Returns:
        The files that were written, and ", in FILE:LINE" of the culprit's main thread, or "".
    """
    sizes: dict[Path, int] = {}
    awaited: list[Path] = []
    _, stopped = ranks.activity()
    for pid, report in ranks.registered.items():
        file = logs / f"rank-{report.rank}.stacks"
        sizes[file] = _file_size(file)
        ranks.send_signal(pid, signal.SIGUSR2)
        if pid not in stopped:
            awaited.append(file)
    deadline = time.monotonic() + FAULTHANDLER_SECONDS
    while time.monotonic() < deadline and any(_file_size(file) == sizes[file] for file in awaited):
        time.sleep(0.05)
    time.sleep(0.1)  # for the last lines of a dump that has just begun

    culprit_file = logs / f"process-{culprit}.stacks"
    rank = ranks.number(culprit)
    if rank is not None:
        culprit_file = logs / f"rank-{rank}.stacks"
    size = sizes.setdefault(culprit_file, _file_size(culprit_file))
    where = _find_top_frame(culprit_file, size)
    if not where:
        _run_py_spy(culprit, culprit_file)
        where = _find_top_frame(culprit_file, size)
    return [file for file, size in sizes.items() if _file_size(file) > size], where


def _file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _find_top_frame(file: Path, offset: int) -> str:
    """Return ", in FILE:LINE" of the main thread, which faulthandler writes last; or ""."""
    try:
        text = read_file(file)[offset:].decode("utf-8", "replace")
    except OSError:
        return ""
    frames = _FAULTHANDLER_FRAME.findall(text) or _PY_SPY_FRAME.findall(text)
    if not frames:
        return ""
    path, line = frames[-1]
    return f", in {Path(path).name}:{line}"


def find_py_spy() -> str | None:
    """Return the path of py-spy: in the folder of this interpreter, else on PATH, else None."""
    program = Path(sys.executable).with_name("py-spy")
    return str(program) if program.exists() else shutil.which("py-spy")


def _run_py_spy(pid: int, file: Path) -> None:
    """Append the stacks that py-spy reads to `file`. Does nothing where it cannot run."""
    program = find_py_spy()
    if program is None:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError), file.open("ab") as output:
        output.write(f"py-spy dump --pid {pid}\n".encode())
        output.flush()
        subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            timeout=PY_SPY_SECONDS,
            check=False,
        )
