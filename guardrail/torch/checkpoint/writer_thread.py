"""One background thread that runs one task after the other, so no training step waits for the
disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from guardrail.torch.state.device_thread import DeviceThread

_NICENESS = 10


class WriterThread:
    """A queue of tasks and the thread that runs them.

    The first `submit` starts the thread: a process that never saves has none, and can still fork.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._tasks: list[Callable[[], None]] = []
        self._is_working = False
        self._thread: threading.Thread | None = None
        self.closing = False

    @property
    def busy(self) -> bool:
        """Whether a task is running or waiting."""
        with self._changed:
            return bool(self._tasks) or self._is_working

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` after all that were submitted before. It must handle its own exceptions."""
        with self._changed:
            self._tasks.append(task)
            if self._thread is None or not self._thread.is_alive():
                self._thread = DeviceThread(self._run, name=self._name)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until all tasks are done; return False if `seconds` are not enough."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._tasks and not self._is_working, timeout=seconds
            )

    def close(self, seconds: float) -> bool:
        """Wait, then end the thread; return whether all tasks are done.

        A task that has not begun by then is not run.
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
            # On Linux this sets the priority of this thread alone. Hashing and writing must not
            # take a core from training.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self.closing)
                if self.closing:
                    return
                task = self._tasks.pop(0)
                self._is_working = True
            try:
                task()
            finally:
                del task  # it may hold a copy of the complete state
                with self._changed:
                    self._is_working = False
                    self._changed.notify_all()
