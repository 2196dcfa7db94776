"""The commands that rank 0 receives. A thread polls the folder commands/, so no step waits for a
file system.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from guardrail.core.records.commands import Command
from guardrail.core.text import clean_text
from guardrail.rundir.run_directory import RunDirectory

SILENT_SECONDS = 30.0  # a poll that takes longer means that the file system hangs


class CommandPoller:
    """Commands in the order of their arrival. `next` only reads a deque.

    The thread continues after every error. `problem` describes the error until a poll succeeds.

    Args:
        run: whose commands/ is polled.
        seconds: between two polls.
        stamp: called by the thread with each command that arrives; returns the command to keep.
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
        self._looked = time.monotonic()  # when the last poll ended
        self._try_to_look()  # commands that wait already are due at the first step
        self._thread = threading.Thread(target=self._poll, name="guardrail-mailbox", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Return why commands are not read at present; "": they are read."""
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
        # the commands stay in the folder until the file system answers again
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
        """Return the oldest command that is due at `step`; None: none is due.

        Its file stays until the command is answered.
        """
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
