"""The terminal's end: a closed window, a dropped SSH connection, SIGHUP, SIGTERM.

A Textual application dies of SIGHUP with its `finally` unrun, and burns a core when SIGHUP is ignored and the terminal
gone, since its input is readable for ever. The screen is only a client: it restores what it can and goes, at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from types import FrameType

CHECK_SECONDS = 0.5
_STUCK_SECONDS = 1.0
# Kitty keyboard off, bracketed paste off, mouse off, line wrap on, main screen, cursor on, focus reports off.
_RESTORE = b"\x1b[<u\x1b[?2004l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?7h\x1b[?1049l\x1b[?25h\x1b[?1004l"


def gone(descriptor: int) -> bool:
    """The other side of a terminal was closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    try:
        return any(flags & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, flags in poll.poll(0))
    except OSError:
        return True


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Ends the process with exit code 0 when the terminal goes, or when SIGHUP or SIGTERM asks for it."""
    descriptors = [d for d in (_descriptor(sys.__stdin__), _descriptor(sys.__stderr__)) if d is not None]
    attributes = {d: termios.tcgetattr(d) for d in descriptors}
    left = threading.Event()

    def leave(signum: int, frame: FrameType | None) -> None:
        _leave(attributes)

    def watch() -> None:
        while not left.wait(CHECK_SECONDS):
            if any(gone(descriptor) for descriptor in descriptors):
                os._exit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGHUP, signal.SIGTERM)}
    threading.Thread(target=watch, name="guardrail-terminal", daemon=True).start()
    try:
        yield
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(attributes: dict[int, list[object]]) -> None:
    """Restore the terminal if it still listens, and end; whatever blocks on the way is cut off by an alarm."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _STUCK_SECONDS)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # setting a terminal from the background would stop us
    for descriptor, saved in attributes.items():
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, saved)  # type: ignore[arg-type]
    for descriptor in list(attributes)[-1:]:
        with contextlib.suppress(OSError):
            if select.select([], [descriptor], [], _STUCK_SECONDS / 2)[1]:  # a slow one is drained meanwhile
                os.write(descriptor, _RESTORE)
    os._exit(0)


def _descriptor(stream: object) -> int | None:
    """The descriptor of a stream that is a terminal."""
    try:
        descriptor = int(stream.fileno())  # type: ignore[attr-defined]
        return descriptor if os.isatty(descriptor) else None
    except (AttributeError, OSError, ValueError):
        return None
