"""Rank 0's view of the inbox: a thread polls the commands folder, so that no step waits for a file system."""

from __future__ import annotations

import contextlib
import threading
from collections import deque

from guardrail.records import Command
from guardrail.rundir import RunDirectory


class Mailbox:
    """Commands in the order of their arrival; `next` costs a look at a deque.

    Args:
        run: whose commands/ is polled.
        seconds: between two looks.
    """

    def __init__(self, run: RunDirectory, *, seconds: float = 0.2) -> None:
        self._run, self._seconds = run, seconds
        self._arrived: deque[Command] = deque()
        self._waiting: list[Command] = []
        self._seen: set[str] = set()
        self._stop = threading.Event()
        with contextlib.suppress(OSError):
            self._look()  # what waits already is due from the first step on
        self._thread = threading.Thread(target=self._poll, name="guardrail-mailbox", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.wait(self._seconds):
            # A file system that does not answer will be back; the commands wait on it.
            with contextlib.suppress(OSError):
                self._look()

    def _look(self) -> None:
        for command in self._run.commands_pending():
            if command.id not in self._seen:
                self._seen.add(command.id)
                self._arrived.append(command)
        for refusal in self._run.commands_refused():
            self._run.answer(refusal, applied=False)

    def next(self, step: int) -> Command | None:
        """The oldest command that is due at `step`; its file stays until it is answered."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        for command in self._waiting:
            if command.at_step <= step:
                self._waiting.remove(command)
                return command
        return None

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
