"""A screen in a process of its own. The process that was started waits for it, and restores the
terminal where the screen dies of a signal that nothing can catch: SIGKILL, SIGSEGV, SIGABRT.

Made before the large imports, it costs one fork, and neither of the two imports anything twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType

from guardrail.core.errors import ExitCode, GuardrailError
from guardrail.tui.terminal import hangup as terminal

# What leaves the screen when it reaches only the process that was started, as `kill PID` and a
# batch system send it.
_PASSED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGHUP,
    signal.SIGINT: signal.SIGTERM,
}


def in_child(screen: Callable[[], int]) -> int:
    """Run `screen` in a child and return its exit code, or 128 + the signal that has killed it.

    To be called while this process has one thread. Without a terminal, `screen` runs right here.
    """
    attributes = terminal.attributes()
    if not attributes:
        return screen()
    sys.stdout.flush()
    sys.stderr.flush()
    child = 0

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, _PASSED[signal.Signals(signum)])

    with _handlers(pass_on) as restore:
        with warnings.catch_warnings():
            # Python warns of threads of any library; those of numpy hold no lock that the fork
            # would want.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            restore()
            terminal.waited_for_by = os.getppid()
            os._exit(_code_of(screen))
        status = _wait(child, attributes)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    terminal.restore(attributes)
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    print(f"guardrail: the screen was ended by {name}; training is not affected", file=sys.stderr)
    return 128 + number


def _code_of(screen: Callable[[], int]) -> int:
    """Run the screen; what it raises ends this process, so it is printed here."""
    try:
        code = screen()
    except GuardrailError as error:
        print(f"guardrail: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return int(code)


def _wait(child: int, attributes: terminal.Attributes) -> int:
    """The wait status of the child once it has ended.

    Where it is stopped, this process stops as well, so that the shell gets its terminal back. A
    child that SIGSTOP has stopped could not restore the terminal itself.

    Args:
        attributes: of the terminal before the child, by descriptor.
    """
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return status
        if terminal.attributes() != attributes:
            terminal.restore(attributes)
        os.kill(os.getpid(), signal.SIGSTOP)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Pass signals on for a while; an ignored one (nohup) stays ignored. Gives what takes the
    handlers back.
    """
    numbers = [number for number in _PASSED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    try:
        yield restore
    finally:
        restore()
