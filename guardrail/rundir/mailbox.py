"""Rank 0's view of the inbox: a thread polls the commands folder, so that no step waits for a file
system.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from guardrail.core.records import Command
from guardrail.core.text import clean_text
from guardrail.rundir.run_directory import RunDirectory

SILENT_SECONDS = 30.0  # a look that takes longer means that the file system hangs


class CommandPoller:
    """Commands in the order of their arrival; `next` costs a look at a deque.

    The thread outlives whatever goes wrong in a look; `problem` says so until a look succeeds
    again.

    Args:
        run: whose commands/ is polled.
        seconds: between two looks.
        stamp: called by the thread with each command that arrives, and returns what is kept of it.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        seconds: float = 0.2,
        stamp: Callable[[Command], Command] = lambda command: command,
    ) -> None:
        self._run, self._seconds, self._stamp = run, seconds, stamp
        self._arrived: deque[Command] = deque()
        self._waiting: list[Command] = []
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._failure = ""
        self._looked = time.monotonic()  # when the last look ended
        self._try_to_look()  # what waits already is due from the first step on
        self._thread = threading.Thread(target=self._poll, name="guardrail-mailbox", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why commands are not read at the moment; "" while they are."""
        if self._failure:
            return self._failure
        if self._stop.is_set():
            return ""
        if not self._thread.is_alive():
            return "the thread that reads them has ended"
        silence = time.monotonic() - self._looked
        return f"commands/ has not answered for {silence:.0f} s" if silence > SILENT_SECONDS else ""

    def _poll(self) -> None:
        while not self._stop.wait(self._seconds):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self._look()
            self._failure = self._run.commands_problem
        # a file system that does not answer will be back; the commands wait on it
        except OSError as error:
            self._failure = clean_text(f"commands/: {error.strerror or error}", 200)
        except Exception as error:  # the thread must not end before the run does
            self._failure = clean_text(f"{type(error).__name__}: {error}", 200)
        self._looked = time.monotonic()

    def _look(self) -> None:
        commands, refusals = self._run.commands_waiting()
        for command in commands:
            if command.id not in self._seen:
                self._seen.add(command.id)
                self._arrived.append(self._stamp(command))
        for refusal in refusals:
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
