"""Ends the screen when the terminal goes: closed window, dropped SSH connection, SIGHUP, SIGTERM.

A Textual application that gets SIGHUP ends without its `finally` blocks. Where SIGHUP is ignored and
the terminal gone, it uses a full core, since its input is readable for ever. The screen is only a
client: it restores what it can and ends at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

CHECK_SECONDS = 0.5
Attributes = Mapping[int, list[Any]]
_STUCK_SECONDS = 1.0
# End of a frame, Kitty keyboard off, bracketed paste off, mouse off, size reports off, line wrap
# on, plain colours, main screen, cursor on, focus reports off.
_RESTORE = (
    b"\x1b[?2026l\x1b[<u\x1b[?2004l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l\x1b[?2048l"
    b"\x1b[?7h\x1b[0m\x1b[?1049l\x1b[?25h\x1b[?1004l"
)
_PARENT_KILLED = (
    b"\r\nguardrail: the monitor's first process was killed; training is not affected\r\n"
)
# the process that waits for this one and restores the terminal after it; 0: none. See `waiting`.
waited_for_by = 0


def is_gone(descriptor: int) -> bool:
    """Return whether the other side of a terminal was closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    closed = select.POLLHUP | select.POLLERR | select.POLLNVAL
    try:
        return any(flags & closed for _, flags in poll.poll(0))
    except OSError:
        return True


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """End the process with exit code 0 when the terminal goes, or on SIGHUP or SIGTERM."""
    known = attributes()
    left = threading.Event()

    def leave(signum: int, frame: FrameType | None) -> None:
        restore(known)
        os._exit(0)

    def watch() -> None:
        while not left.wait(CHECK_SECONDS):
            if any(is_gone(descriptor) for descriptor in known):
                os._exit(0)
            if waited_for_by and os.getppid() != waited_for_by:
                # The parent was killed, and the shell has its terminal back. Its settings for keys
                # are not restored: the shell may have changed them by now.
                _show_shell(known, _PARENT_KILLED)
                os._exit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGHUP, signal.SIGTERM)}
    threading.Thread(target=watch, name="guardrail-terminal", daemon=True).start()
    try:
        yield
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def attributes() -> Attributes:
    """Return descriptor -> settings of the terminal of keys and of the one that is drawn on."""
    found: dict[int, list[Any]] = {}
    for stream in (sys.__stdin__, sys.__stderr__):
        descriptor = _descriptor(stream)
        if descriptor is not None:
            found[descriptor] = termios.tcgetattr(descriptor)
    return found


def restore(known: Attributes) -> None:
    """Restore the terminal if it still responds; an alarm ends the process where a call blocks.

    Args:
        known: settings by descriptor.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _STUCK_SECONDS)
    # setting a terminal from the background would stop this process
    background = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    for descriptor, saved in known.items():
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, saved)
            # reports of the mouse that no one has read
            termios.tcflush(descriptor, termios.TCIFLUSH)
    _show_shell(known)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGTTOU, background)


def _show_shell(known: Attributes, words: bytes = b"") -> None:
    for descriptor in list(known)[-1:]:
        with contextlib.suppress(OSError):
            # a slow terminal is drained while this waits
            if select.select([], [descriptor], [], _STUCK_SECONDS / 2)[1]:
                os.write(descriptor, _RESTORE + words)


def _descriptor(stream: object) -> int | None:
    """Return the descriptor of a stream; None where it is no terminal."""
    try:
        descriptor = int(stream.fileno())  # type: ignore[attr-defined]
        return descriptor if os.isatty(descriptor) else None
    except (AttributeError, OSError, ValueError):
        return None
