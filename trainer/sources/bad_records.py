"""Records that cannot be used: counted by kind, the first ones named."""

from __future__ import annotations

from dataclasses import dataclass, field

from guardrail.core.text import clean_text

NO_FILE = "source without a file"
NO_TEXT = "source without usable text"
UNREADABLE = "unreadable file"
ARCHIVE = "damaged archive"
ENCODING = "invalid UTF-8"
JSON = "broken JSON"
FIELD = "no text field"
EMPTY = "empty document"
LARGE = "document too large"

NAMED = 5  # bad records that are named, per kind
_LONGEST = 400  # characters of one name


@dataclass
class BadRecords:
    """Bad records of a corpus. A corpus fails only when nothing else is left.

    Attributes:
        counts: kind -> how many.
        named: kind -> the first `NAMED` of them, each "PATH:LINE (what is wrong)".
    """

    counts: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, kind: str, path: str, record: int = 0, reason: str = "") -> None:
        """Count one bad record.

        Args:
            record: its line, from 1; 0: the complete file.
            reason: what is wrong; "": the kind says it.
        """
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.named.setdefault(kind, [])
        if len(names) >= NAMED:
            return
        name = path
        if record:
            name = f"{path}:{record}"
        if reason:
            name = f"{name} ({reason})"
        names.append(clean_text(name, _LONGEST))

    def merge(self, other: BadRecords) -> None:
        """Add the records of `other`."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            names = self.named.setdefault(kind, [])
            names += other.named[kind][: NAMED - len(names)]

    def lines(self) -> list[str]:
        """Return one line per kind: "2 x broken JSON: a.jsonl:3 (...), a.jsonl:9 (...)"."""
        lines = []
        for kind, count in self.counts.items():
            line = f"{count} x {kind}: {', '.join(self.named[kind])}"
            unnamed = count - len(self.named[kind])
            if unnamed > 0:
                line += f" and {unnamed} more"
            lines.append(line)
        return lines
