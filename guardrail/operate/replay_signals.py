"""The signals that end a replay: Ctrl-C, SIGTERM and a closed terminal.

The processes of a replay have their own session, so no terminal ends them. Each of these signals
therefore ends the replay in order: its processes are stopped and its folder is removed.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from guardrail.core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ReplaySignals:
    """Raises Interrupted once, at the first signal. A signal that was ignored (nohup) stays so.

    Further signals do nothing, so that they cannot interrupt the end of the processes.
    """

    def __init__(self) -> None:
        self._is_requested = False
        self._is_raised = False
        self._held = 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> ReplaySignals:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay the interruption until the block has ended."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self._raise_if_requested()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._is_requested = True
        self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self._is_requested and not self._is_raised and not self._held:
            self._is_raised = True
            raise Interrupted("the replay was interrupted; the run is unchanged")
