"""Records that cannot be used: counted by kind, the first few named, fatal only when nothing else
is left.
"""

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

NAMED = 5  # of each kind
_LONGEST = 400  # characters of one name


@dataclass
class BadRecords:
    """Attributes:
    counts: kind -> how many.
    named: kind -> the first `NAMED` of them, each "PATH:LINE (what is wrong)".
    """

    counts: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, kind: str, path: str, record: int = 0, reason: str = "") -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.named.setdefault(kind, [])
        if len(names) < NAMED:
            place = f"{path}:{record}" if record else path
            names.append(clean_text(f"{place} ({reason})" if reason else place, _LONGEST))

    def merge(self, other: BadRecords) -> None:
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            names = self.named.setdefault(kind, [])
            names += other.named[kind][: NAMED - len(names)]

    def lines(self) -> list[str]:
        """One line a kind: "2 x broken JSON: a.jsonl:3 (...), a.jsonl:9 (...)"."""
        lines = []
        for kind, count in self.counts.items():
            more = (
                f" and {count - len(self.named[kind])} more"
                if count > len(self.named[kind])
                else ""
            )
            lines.append(f"{count} x {kind}: {', '.join(self.named[kind])}{more}")
        return lines
