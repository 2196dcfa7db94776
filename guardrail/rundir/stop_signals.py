"""Signals that a rank, the supervisor or `launch` handles. Imports no torch.

                   rank                                  supervisor
SIGTERM, SIGUSR1   save and stop at the next safe point  ask the ranks to save and stop
later SIGTERM      end at once with status 143           kill everything at once (so does SIGQUIT)
SIGUSR2            stacks of all threads to a file       -
SIGHUP             ignored: training outlives every terminal

Schedulers and `timeout` send several SIGTERMs for one request, to a process and to its group. All
that arrive within DEBOUNCE_SECONDS of the first one are one request. A later SIGTERM is a second
request.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import BinaryIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
KILLED = 128 + signal.SIGTERM  # exit status after the second request
DEBOUNCE_SECONDS = 2.0


class TermRequests:
    """Distinguishes a second request to stop from a repetition of the first one."""

    def __init__(self) -> None:
        self._first: float | None = None  # time.monotonic()

    def is_second(self) -> bool:
        """Record one SIGTERM; return whether it is too late to be part of the first request."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > DEBOUNCE_SECONDS


class StopSignals:
    """The stop signals of a rank.

    Call `install` from the main thread, as early as possible and before a data worker is forked.

    Python runs a signal handler only between two bytecodes of the main thread. That thread may be
    in a collective for minutes. So another thread reads the bytes that the interpreter's C handler
    writes to a pipe, and ends the process.
    """

    def __init__(self) -> None:
        self._requested = False
        self._terms = TermRequests()
        self._received: set[int] = set()
        self._stacks: BinaryIO | None = None

    @property
    def requested(self) -> bool:
        return self._requested

    def came_from_supervisor(self, *, seconds: float) -> bool:
        """Return whether the supervisor asks to stop (SIGUSR1). Waits up to `seconds` for it.

        A run with a supervisor can get a SIGTERM without SIGUSR1. It then comes from the elastic
        agent, which ends this rank because another one has failed. A batch system sends its SIGTERM
        to the supervisor as well.
        """
        deadline = time.monotonic() + seconds
        while signal.SIGUSR1 not in self._received and time.monotonic() < deadline:
            time.sleep(0.02)
        return signal.SIGUSR1 in self._received

    def install(self, stacks: Path | None = None) -> None:
        """Handle SIGTERM and SIGUSR1.

        With `stacks`, SIGUSR2 appends the stacks of all threads to that file.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)  # the interpreter refuses a blocking descriptor
        threading.Thread(
            target=self._listen, args=(reading,), name="stop-signals", daemon=True
        ).start()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if stacks is not None:
            self._stacks = stacks.open("ab", buffering=0)
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True, chain=False)
        _hook_forks()

    def request(self) -> None:
        """Request a stop without a signal."""
        self._requested = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Set the request at once, before the thread reads the pipe.

        It replaces the default action, which ends the process.
        """
        self._requested = True

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                self._received.add(number)
                if number in STOP_SIGNALS:
                    self._requested = True
                if number == signal.SIGTERM and self._terms.is_second():
                    os._exit(KILLED)


# A forked child, such as a data worker, must not save or report for the rank. It inherits the
# handlers and the pipe. So the signals are blocked during the fork, until the child has removed
# both.
_masks = threading.local()
_hooked = False


def _hook_forks() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget)


def _block() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forget() -> None:
    """Restore the default action of SIGTERM and ignore SIGUSR1, in a forked child.

    multiprocessing ends its workers with SIGTERM.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _unblock()


class SupervisorSignals:
    """The signals of the supervisor.

    `wait` returns early when a signal arrives, also on SIGCHLD of the elastic agent.

    Attributes:
        stop: name of the first signal that asked to stop, or "".
        kill: a signal has asked to kill all processes at once.
    """

    def __init__(self) -> None:
        self.stop = ""
        self.kill = False
        self._terms = TermRequests()
        self._reading, writing = os.pipe()
        for descriptor in (self._reading, writing):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        for number in (*STOP_SIGNALS, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM:
            self.kill |= self._terms.is_second()
        self.kill |= signum == signal.SIGQUIT
        self.stop = self.stop or signal.Signals(signum).name

    def wait(self, seconds: float) -> None:
        if select.select([self._reading], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reading, 64)
