"""Where a rank stands: the stacks of its threads, before it is killed."""

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

FAULTHANDLER_SECONDS = 2.0  # a process that can run at all has written its stacks by then
PY_SPY_SECONDS = 8.0
# The innermost frame of a thread, as faulthandler and as py-spy print it.
_FAULTHANDLER_FRAME = re.compile(
    r'[Tt]hread 0x[0-9a-f]+.*\(most recent call first\):\n  File "([^"]+)", line (\d+)'
)
_PY_SPY_FRAME = re.compile(r'"MainThread"\n +\S+ \(([^():]+):(\d+)\)')


def capture(logs: Path, ranks: LocalRanks, culprit: int) -> tuple[list[Path], str]:
    """Append the stacks of all local ranks to logs/rank-N.stacks.

    SIGUSR2 makes faulthandler write them (see guardrail.rundir.stop_signals); a process that is
    stopped or lives in C++ only does not answer, so py-spy reads the culprit from outside where it
    is installed and allowed.

    Returns:
        The files that were written, and ", in FILE:LINE" of the culprit's main thread if it could
        be read.
    """
    before: dict[Path, int] = {}
    awaited: list[Path] = []
    _, stopped = ranks.activity()
    for pid, report in ranks.registered.items():
        file = logs / f"rank-{report.rank}.stacks"
        before[file] = _size(file)
        ranks.tell(pid, signal.SIGUSR2)
        if pid not in stopped:
            awaited.append(file)
    deadline = time.monotonic() + FAULTHANDLER_SECONDS
    while time.monotonic() < deadline and any(_size(file) == before[file] for file in awaited):
        time.sleep(0.05)
    time.sleep(0.1)  # the last lines of a dump that has just begun

    rank = ranks.number(culprit)
    culprit_file = logs / (
        f"rank-{rank}.stacks" if rank is not None else f"process-{culprit}.stacks"
    )
    size = before.setdefault(culprit_file, _size(culprit_file))
    where = _top_frame(culprit_file, size)
    if not where:
        _py_spy(culprit, culprit_file)
        where = _top_frame(culprit_file, size)
    return [file for file, size in before.items() if _size(file) > size], where


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _top_frame(file: Path, offset: int) -> str:
    """Where the main thread stands; faulthandler writes it last."""
    try:
        text = read_file(file)[offset:].decode("utf-8", "replace")
    except OSError:
        return ""
    frames = _FAULTHANDLER_FRAME.findall(text) or _PY_SPY_FRAME.findall(text)
    return f", in {Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""


def py_spy() -> str | None:
    """The program, beside this interpreter or on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _py_spy(pid: int, file: Path) -> None:
    program = py_spy()
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
