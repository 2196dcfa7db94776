"""One file of documents, before it is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file, or one piece of text that a source holds, with documents in it.

    Attributes:
        path: absolute path, or a name that its source understands, such as "builtin:...".
        key: its name below the source that it was found in. The held-out split hashes it, so that
            the split is the same wherever the data lies.
        size: bytes on disk.
        mtime_ns: time of the last change, in nanoseconds.
        records: whether each line is a JSON record; else the content is one document.
        compression: "", "gz" or "zst".
        source: `Source.name` of the source that opens it.
    """

    path: str
    key: str
    size: int
    mtime_ns: int = 0
    records: bool = False
    compression: str = ""
    source: str = "files"
