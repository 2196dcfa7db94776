"""run.lock: allows one trainer per run, and names it. A part of `guardrail.rundir.run_directory`.

The lock ends with the process of the trainer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

import msgspec

from guardrail.core.errors import RunDirectoryError
from guardrail.core.files import FILE_MODE, encode_json
from guardrail.core.records.record import Record
from guardrail.core.text import clean_text

_TRIES = 25  # times 20 ms: longer than a reader holds the lock to check it


class Holder(Record, frozen=True, kw_only=True):
    """The trainer of a run directory."""

    who: str
    host: str = ""
    pid: int = 0
    time: float = 0.0

    def sentence(self) -> str:
        return f"{clean_text(self.who, 80)}, process {self.pid} on {clean_text(self.host, 80)}"


class RunLock:
    """The lock of a trainer. It lasts until `release`, or until this process ends in any way.

    Forked children do not hold it.

    Raises:
        RunDirectoryError: another process holds the lock; the message names it.
    """

    def __init__(self, path: Path, who: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, FILE_MODE)
        try:
            self._acquire(path)
            holder = Holder(who=who, host=socket.gethostname(), pid=os.getpid(), time=time.time())
            # on a full disk the lock is held, and its holder is unknown to others
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, encode_json(holder), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        _HELD.add(self)

    def _acquire(self, path: Path) -> None:
        for _ in range(_TRIES):
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
        holder = _read(self._descriptor)
        who = holder.sentence() if holder else "an unknown process"
        raise RunDirectoryError(f"{path.parent}: already running ({who})", kind="running")

    def release(self) -> None:
        _HELD.discard(self)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder_of(path: Path) -> Holder | None:
    """Return the running trainer, or None.

    It tests the lock itself, so the file of a dead trainer does not count.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(descriptor) or Holder(who="unknown")
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Holder)
    except (OSError, msgspec.DecodeError):
        return None


_HELD: set[RunLock] = set()


def _release_in_child() -> None:
    """Release the locks in a forked child.

    A flock lasts as long as any copy of its descriptor. A forked worker that outlives the trainer
    would otherwise keep the lock.
    """
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
