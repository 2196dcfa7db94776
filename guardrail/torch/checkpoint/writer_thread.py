"""One thread that does one thing after the other, so that the training step never waits for the
disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

_NICENESS = 10


class Background:
    """Started by the first `submit`: a process that never saves has no thread, and can still
    fork.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._work: list[Callable[[], None]] = []
        self._working = False
        self._thread: threading.Thread | None = None
        self.closing = False

    @property
    def busy(self) -> bool:
        with self._changed:
            return bool(self._work) or self._working

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` after all that was submitted before. It has to deal with its own exceptions."""
        with self._changed:
            self._work.append(work)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Until all is done; False when `seconds` were not enough."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._work and not self._working, timeout=seconds
            )

    def close(self, seconds: float) -> bool:
        """Wait, then end the thread; what has not begun by then is left undone. Returns whether all
        was done.
        """
        deadline = time.monotonic() + seconds
        done = self.wait(seconds)
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=max(1.0, deadline - time.monotonic()))
        return done

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            # Of this thread alone, on Linux. Hashing and writing must not take a core away from
            # training.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self.closing)
                if self.closing:
                    return
                work = self._work.pop(0)
                self._working = True
            try:
                work()
            finally:
                del work  # and what it holds, which may be a copy of the whole state
                with self._changed:
                    self._working = False
                    self._changed.notify_all()
