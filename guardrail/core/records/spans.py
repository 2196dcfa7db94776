"""Ranges of samples that a run skips, and the documents that a sample consists of."""

from __future__ import annotations

from guardrail.core.records.record import Record

AUTOMATIC = ("rejected", "rollback")  # origins of the spans that the guard skipped automatically


MAX_NAMED = 16  # documents or parameters named in one journal line; the rest is counted


class Span(Record, frozen=True, kw_only=True, rename={"origin": "cause"}):
    """A range [first, last) of positions of the sample order that the run skips, and why.

    On disk and in JSON `origin` is called "cause".

    Attributes:
        origin: "rejected" (one skipped update), "rollback", "user" or "file".
        step: at which it was decided.
        batches: number of batches that it covers.
        positions: ascending. If there are any, only these samples of the range are skipped.
        allowed: a user agreed to it. It is more than the guard may skip without asking.
    """

    first: int
    last: int
    origin: str
    step: int
    reason: str = ""
    batches: int = 1
    positions: tuple[int, ...] = ()
    allowed: bool = False


class DocumentRef(Record, frozen=True, kw_only=True):
    """The part of a document that a sample consists of, so that a user can look it up.

    Attributes:
        path: file, or "builtin:..." for text that is in no file.
        record: line of a JSONL file, counted from 1; 0: the file is one document.
        first_byte, last_byte: range [first_byte, last_byte) of the document's text in UTF-8. Where
            `record` is 0, that text is the uncompressed file.
    """

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0

    def __str__(self) -> str:
        line = f":{self.record}" if self.record else ""
        return f"{self.path}{line} bytes {self.first_byte}-{self.last_byte}"
