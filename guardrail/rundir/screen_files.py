"""The screens that are attached to a run: one empty file each, whose time is updated."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from guardrail.core.files import FILE_MODE, FOLDER_MODE
from guardrail.core.text import clean_text

SCREEN_SECONDS = 15.0  # a screen whose file is older counts as closed


def mark_seen(folder: Path) -> None:
    """Record that this process shows the run. On a full disk the screen is not counted."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        _touch(_own_file(folder))


def mark_gone(folder: Path) -> None:
    with contextlib.suppress(OSError):
        _own_file(folder).unlink()


def count_screens(folder: Path) -> int:
    """Count the screens of the last 15 seconds.

    The clock of the file system counts, since those of their hosts may differ.
    """
    alive = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
        now = _time_of(folder) if seen else 0.0
        for entry in seen:
            with contextlib.suppress(OSError):
                alive += abs(now - entry.stat(follow_symlinks=False).st_mtime) < SCREEN_SECONDS
    return alive


def _own_file(folder: Path) -> Path:
    host = clean_text(socket.gethostname(), 64).replace("/", "_")
    return folder / f"{host}-{os.getpid()}"


def _time_of(folder: Path) -> float:
    """Return the time of the file system; that of the host if nothing can be written."""
    try:
        return _touch(folder / ".clock")
    except OSError:
        return time.time()


def _touch(path: Path) -> float:
    """Set the time of a file to now, by the clock of its file system, and return it. Raises
    OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        os.utime(descriptor)
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
