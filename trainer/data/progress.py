"""Work that can be interrupted and reports its progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from guardrail.core.errors import Interrupted

ReportProgress = Callable[[str, float], None]  # (what is done, share that is done in [0, 1])
Stop = Callable[[], bool]

LOOKING = "looking for text"  # what is done at first
REPORT_SECONDS = 0.25
POLL_SECONDS = 0.002


class Progress:
    """Called from every inner loop: polls `stop`, and reports `share` a few times per second.

    Raises Interrupted as soon as `stop()` is true.

    Attributes:
        text: what is done.
        share: of it that is done, in [0, 1]; set by the work.
    """

    def __init__(self, progress: ReportProgress, stop: Stop, text: str = LOOKING) -> None:
        self._progress, self._stop = progress, stop
        self._polled = self._reported = 0.0
        self.text, self.share = text, 0.0

    def begin(self, text: str) -> None:
        """Begin another part of the work, at share 0."""
        self.text, self.share, self._reported = text, 0.0, 0.0
        self()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            if self._stop():
                raise Interrupted(f"stopped while {self.text}")
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self._progress(self.text, min(1.0, self.share))
