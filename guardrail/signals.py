"""Stop requests that reach a rank as signals. Imports no torch.

SIGTERM, SIGUSR1   save and stop: `requested` turns true, the loop reads it at its next safe point
second SIGTERM     ends the process at once with status 143, even while the main thread waits inside a collective
SIGUSR2            faulthandler writes the stack of every thread to a file, even while Python cannot run

The Python handler of a signal runs only between two bytecodes of the main thread, which may sit in C++ for minutes.
So a thread reads the bytes that the interpreter's C handler writes to a pipe (signal.set_wakeup_fd).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import BinaryIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
KILLED = 128 + signal.SIGTERM  # exit status after the second SIGTERM


class StopSignals:
    """One per process; `install` from the main thread, as early as possible and before any data worker is forked."""

    def __init__(self) -> None:
        self._requested = False
        self._terms = 0
        self._stacks: BinaryIO | None = None

    @property
    def requested(self) -> bool:
        return self._requested

    def install(self, stacks: Path | None = None) -> None:
        """Take over SIGTERM and SIGUSR1; with `stacks`, SIGUSR2 appends the stacks of all threads to that file."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)  # the interpreter refuses a blocking one
        threading.Thread(target=self._listen, args=(reading,), name="stop-signals", daemon=True).start()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if stacks is not None:
            self._stacks = stacks.open("ab", buffering=0)
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True, chain=False)
        os.register_at_fork(after_in_child=_forget)

    def request(self) -> None:
        """The same as a signal; for a stop that came another way."""
        self._requested = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Says at once what the thread is about to find out; replaces the default action, which would kill."""
        self._requested = True

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._requested = True
                if number == signal.SIGTERM:
                    self._terms += 1
                    if self._terms > 1:
                        os._exit(KILLED)


def _forget() -> None:
    """In a forked child, such as a data worker: it must neither save nor speak for the rank.

    SIGTERM gets its default action back, because that is how multiprocessing ends its workers; SIGUSR1, whose
    default would kill, is ignored.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
