"""Journal lines about faults outside the training numbers: ranks, disks, messages that were sent."""

from __future__ import annotations

from typing import ClassVar

from guardrail.core.events.event import INCIDENT, Event, Int64


class RankFault(Event, frozen=True, kw_only=True):
    """Base of the lines about a rank that no longer trains."""

    symbol: ClassVar[str] = "✗"
    printed: ClassVar[bool] = True
    topic: ClassVar[str] = INCIDENT

    rank: Int64 | None = None
    host: str = ""

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
        log: path of its output in the run directory.
    """

    kind: str = "rank_failed"
    exit: Int64 | None = None
    log: str = ""


class RankHung(RankFault, frozen=True, kw_only=True):
    """A rank made no progress, and the ranks were killed.

    Attributes:
        phase: in which it stood.
        seconds: without progress.
        stacks: files with the stacks of the ranks.
    """

    kind: str = "rank_hung"
    phase: str = ""
    seconds: float = 0.0
    stacks: tuple[str, ...] = ()


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
