"""Journal lines about faults outside the training numbers: ranks, disks, messages that were sent."""

from __future__ import annotations

import signal
from typing import ClassVar

from guardrail.core.events.event import INCIDENT, Event, Int64


class RankFault(Event, frozen=True, kw_only=True):
    """Base of the lines about a rank that no longer trains.

    Attributes:
        rank: its number; None: the process had none yet.

    Class attributes:
        fault: its name in the report.
    """

    symbol: ClassVar[str] = "✗"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT
    fault: ClassVar[str] = ""

    rank: Int64 | None = None

    @property
    def tone(self) -> str:
        return "bad"

    @property
    def notice(self) -> str:
        return self.kind


class RankFailed(RankFault, frozen=True, kw_only=True):
    """A rank's process ended by itself.

    Attributes:
        exit: its exit code; below 0: the signal that killed it.
        error: the exception that ended it, one line; "" if it wrote none.
        log: path of its output in the run directory.
    """

    fault: ClassVar[str] = "rank failed"

    kind: str = "rank_failed"
    exit: Int64 | None = None
    error: str = ""
    host: str = ""
    log: str = ""

    def describe_failure(self) -> str:
        """Return "rank 1 exited with 1 (ValueError: no)"."""
        said = f"rank {self.rank} {describe_exit(self.exit or 0)}"
        if self.error:
            said += f" ({self.error})"
        return said

    def sentence(self) -> str:
        return self.message or f"{self.describe_failure()} on {self.host}"


class RankHung(RankFault, frozen=True, kw_only=True):
    """A rank made no progress, and the ranks were killed.

    Attributes:
        phase: in which it stood.
        seconds: without progress.
        stacks: files with the stacks of the ranks.
        log: path of the rank's output in the run directory, of a journal that says so.
    """

    fault: ClassVar[str] = "rank hung"
    optional: ClassVar[frozenset[str]] = frozenset(("log",))

    kind: str = "rank_hung"
    phase: str = ""
    seconds: float = 0.0
    host: str = ""
    stacks: tuple[str, ...] = ()
    log: str = ""


class DiskChanged(Event, frozen=True, kw_only=True):
    """The disk fails, or works again.

    Attributes:
        state: "failing" or "ok".
        reason: all that cannot be written, as in `Status.disk`.
    """

    symbol: ClassVar[str] = "▲"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT

    kind: str = "disk"
    state: str = ""
    reason: str = ""

    @property
    def mark(self) -> str:
        return "●" if self.is_ok else self.symbol

    @property
    def is_ok(self) -> bool:
        return self.state == "ok"

    @property
    def tone(self) -> str:
        return "good" if self.is_ok else "bad"

    @property
    def notice(self) -> str:
        return "disk_ok" if self.is_ok else "disk_failing"


class Notified(Event, frozen=True, kw_only=True):
    """A message about a journal line was sent, or could not be sent.

    Attributes:
        of: number of the line.
        event: word of `[notify] on`.
        way: "command", "webhook" or "apprise".
    """

    kind: str = "notified"
    of: Int64 = 0
    event: str = ""
    way: str = ""
    ok: bool = False
    reason: str = ""
    seconds: float = 0.0

    def sentence(self) -> str:
        """Return "rank_failed of line 7 by webhook: failed: the server answers 503"."""
        if self.message:
            return self.message
        outcome = "sent"
        if self.reason:
            outcome = f"failed: {self.reason}"
        return f"{self.event} of line {self.of} by {self.way}: {outcome}"


def describe_exit(status: int) -> str:
    """Return how a process ended: "exited with 1", "was killed by SIGKILL"."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
