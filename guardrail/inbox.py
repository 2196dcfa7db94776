"""Rank 0's inbox: a thread polls the commands folder, so that no step waits for a file system."""

from __future__ import annotations

import threading
from collections import deque

from guardrail.records import Command
from guardrail.rundir import RunDirectory


class Inbox:
    """Commands in the order of their arrival; `next` costs a look at a deque.

    Args:
        run: whose commands/ is polled.
        seconds: between two looks.
    """

    def __init__(self, run: RunDirectory, *, seconds: float = 0.2) -> None:
        self._run, self._seconds = run, seconds
        self._ready: deque[Command] = deque()
        self._later: list[Command] = []
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="guardrail-inbox", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.wait(self._seconds):
            self.look()

    def look(self) -> None:
        """One look at the folder; called by the thread, and at once by who cannot wait for it."""
        try:
            pending = self._run.commands_pending()
        except OSError:
            return  # the file system will be back, or the run has other troubles
        for command in pending:
            if command.id not in self._seen:
                self._seen.add(command.id)
                self._ready.append(command)

    def next(self, step: int) -> Command | None:
        """The oldest command that is due at `step`; it stays pending on disk until it is answered."""
        while self._ready:
            self._later.append(self._ready.popleft())
        for command in self._later:
            if command.at_step <= step:
                self._later.remove(command)
                return command
        return None

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
