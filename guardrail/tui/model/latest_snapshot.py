"""The newest snapshot of a run, replaced field by field by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from guardrail.tui.model.view import Snapshot


class LatestSnapshot:
    """Holds the newest snapshot.

    Attributes:
        now: the snapshot; a snapshot never changes, it is replaced.
        notify: called, on the thread that publishes, after each change.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.now = snapshot
        self.notify: Callable[[], None] = lambda: None
        self._lock = threading.Lock()  # two threads may replace fields at the same time

    def publish(self, **news: Any) -> None:
        """Replace these fields, and notify where one of them differs."""
        with self._lock:
            if all(getattr(self.now, name) == value for name, value in news.items()):
                return
            self.now = replace(self.now, **news)
        self.notify()
