"""Threads of the reader: each starts its work again after a failure, and reports the failure."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

# before a thread that failed starts again; twice as long after each further failure
RESTART_SECONDS = 1.0
LONGEST_RESTART_SECONDS = 30.0


class WorkQueue:
    """Functions that one thread calls in their order."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def put(self, work: Callable[[], None]) -> None:
        self._waiting.put(work)

    def close(self) -> None:
        """End `run` once it has called what is waiting."""
        self._waiting.put(None)

    def run(self) -> None:
        """Call what is put, until `close`."""
        while (work := self._waiting.get()) is not None:
            work()

    def run_waiting(self) -> None:
        """Call what is waiting, on this thread; for a queue that no other thread runs."""
        while not self._waiting.empty():
            if (work := self._waiting.get()) is not None:
                work()


class WorkerThread:
    """One daemon thread.

    Args:
        name: of the part of the reader, as failures name it.
        work: what the thread does; it returns when the screen is left.
        leaving: set when the screen is left.
        on_failure: called with the name and the exception, before the work starts again.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        *,
        leaving: threading.Event,
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._name, self._work = name, work
        self._leaving, self._on_failure = leaving, on_failure
        self._thread = threading.Thread(target=self._run, name=f"guardrail-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait for the end, at most so many seconds; a thread that never started has ended."""
        if self._thread.is_alive():
            self._thread.join(timeout=timeout)

    def _run(self) -> None:
        pause = RESTART_SECONDS
        while not self._leaving.is_set():
            try:
                return self._work()
            # Every kind: a thread that dies without a message looks like a run that is quiet.
            except Exception as error:
                self._on_failure(self._name, error)
                self._leaving.wait(pause)
                pause = min(2 * pause, LONGEST_RESTART_SECONDS)
