"""One line of the journal: the base of all kinds, and a line of a kind that this version lacks.

The file `journal.jsonl` holds flat objects: six fixed fields, and beside them those of the kind.
A class of this package names the fields of one kind. `guardrail.core.events.kinds` lists them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from guardrail.core.records.record import Record

# What a reader may raise on a line that another version has written, or that is damaged.
SENSELESS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)
# JSON has integers of any length. A longer one fits into no column of the metrics.
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Positions = tuple[Int64, Int64]  # [first, last) of the sample order
FIXED = ("seq", "time", "step", "timeline", "kind", "message")
INCIDENT, COMMAND = "incident", "command"  # topics of lines


class Event(Record, frozen=True, kw_only=True):
    """One journal line. For a kind that this version does not know, `data` holds all fields.

    Attributes:
        seq: number of the line, from 1; 0 before it is written.
        time: seconds since the epoch.
        data: all fields except the six fixed ones, as on disk.
        unreadable: names of fields that hold no value of their type. They have their defaults.

    Class attributes:
        symbol: one character for the log and for the axis of a chart.
        printed: the line is shown by a program that prints a run as plain lines.
        topic: under which a tracker keeps the line as text: INCIDENT or COMMAND; "": it does not.
        optional: fields that are not written while they hold their defaults; see `may_omit`.
    """

    symbol: ClassVar[str] = "·"
    printed: ClassVar[bool] = False
    topic: ClassVar[str] = ""
    optional: ClassVar[frozenset[str]] = frozenset()

    seq: Int64 = 0
    time: float = 0.0
    step: Int64 = 0
    timeline: Int64 = 0
    kind: str = ""
    message: str = ""
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def is_printed(self) -> bool:
        """Return whether a program that prints a run as plain lines shows this line."""
        return self.printed

    @property
    def mark(self) -> str:
        """Return the symbol of this line."""
        return self.symbol

    @property
    def tone(self) -> str:
        """Return the tone of the line on the screen: "plain", "good", "warn" or "bad"."""
        return "plain"

    @property
    def notice(self) -> str:
        """Return the word of `[notify] on` for this line; "": there is no notification."""
        return ""

    @property
    def timeline_after(self) -> int:
        """Return the timeline of the run after this line: `new_timeline` where the line has one."""
        begun: int | None = getattr(self, "new_timeline", None)
        if begun is None:
            return self.timeline
        return begun

    def sentence(self) -> str:
        """Return the line in one sentence; "": it has none."""
        return self.message

    def all_fields(self) -> dict[str, Any]:
        """Return all fields of the line, as on disk."""
        return {**{name: getattr(self, name) for name in FIXED}, **self.data}

    def may_omit(self, name: str) -> bool:
        """Return whether a field is not written on this line while it holds its default."""
        return name in self.optional

    def check_readable(self, *names: str) -> None:
        """Raise ValueError if one of these fields is damaged."""
        for name in names:
            if name in self.unreadable:
                raise ValueError(f"line {self.seq}: {name} cannot be read")
