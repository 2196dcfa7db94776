"""One file of documents, before it is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file, or one piece of built-in text, that holds documents.

    Attributes:
        path: absolute path, or "builtin:...".
        key: its name below the source that it was found in. The held-out split hashes it, so that
            the split is the same wherever the data lies.
        size: bytes on disk.
        mtime_ns: last change.
        records: each line is a JSON record; else the whole file is one document.
        compression: "", "gz" or "zst".
    """

    path: str
    key: str
    size: int
    mtime_ns: int = 0
    records: bool = False
    compression: str = ""
