"""Runs the screen in a child process. The parent restores the terminal if the child is killed.

SIGKILL, SIGSEGV and SIGABRT cannot be caught, so the screen cannot restore the terminal itself. The
process forks before the large imports: that costs one fork, and no module is imported twice.
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

# Signal to the parent -> signal to the child. `kill PID` and batch systems reach the parent only.
_PASSED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGHUP,
    signal.SIGINT: signal.SIGTERM,
}


def in_child(screen: Callable[[], int]) -> int:
    """Run `screen` in a child; return its exit code, or 128 + the signal that killed it.

    Call it while this process has one thread. Without a terminal, `screen` runs in this process.
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

    with _passing_on(pass_on) as restore:
        with warnings.catch_warnings():
            # Python warns of threads of any library. Those of numpy hold no lock that the child
            # needs.
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
    """Run the screen and return the exit code; errors are printed here, as this process ends."""
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
    """Return the wait status of the child once it has ended.

    When the child is stopped, this process stops as well, so that the shell gets its terminal back.
    A child that was stopped by SIGSTOP could not restore the terminal itself.

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
def _passing_on(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Pass signals on; an ignored one (nohup) stays ignored. Yield what restores the handlers."""
    numbers = [number for number in _PASSED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    try:
        yield restore
    finally:
        restore()
