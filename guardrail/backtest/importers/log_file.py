"""The beginning of a file, from which importers recognise its format."""

from __future__ import annotations

import errno
import functools
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 64 * 1024
_LOOKED_AT = 4096  # bytes in which control characters are counted
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_NO_JSON = ("{'", "[rank", "[202")  # a Python dictionary; the rank or the date of a log line


@dataclass(frozen=True)
class LogFile:
    """A file that may be a log.

    Attributes:
        head: its first `HEAD_BYTES` bytes.
        is_named: the user named this file. Otherwise a search of a folder found it.
    """

    path: Path
    head: bytes
    is_named: bool

    @classmethod
    def open(cls, path: Path, *, is_named: bool) -> LogFile:
        """Read the beginning of a file.

        Raises:
            OSError: it cannot be read, or is neither a file nor a folder. A pipe or a device may
                never end, and importers read twice.
        """
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "neither a file nor a folder")
        with path.open("rb") as file:
            return cls(path, file.read(HEAD_BYTES), is_named)

    @property
    def is_empty(self) -> bool:
        """Return whether it holds nothing but blanks, and zeros as a crash leaves them."""
        return not self.head.strip(b"\0\r\n\t ")

    @property
    def is_utf16(self) -> bool:
        """Return whether it is UTF-16 text, as a console of Windows writes it."""
        return self.head.startswith(_UTF16)

    @functools.cached_property
    def is_binary(self) -> bool:
        """Return whether it is not text. Zeros at the end do not count: a crash leaves them."""
        data = self.head.rstrip(b"\0")
        start = data[:_LOOKED_AT]
        control = sum(byte < 9 or 13 < byte < 27 for byte in start)
        return data.count(0) > 0 or 50 * control > len(start)

    @functools.cached_property
    def text(self) -> str:
        """Return the beginning as text, without blanks before it."""
        return self.head.decode("utf-8-sig", "replace").lstrip()

    @property
    def first_line(self) -> str:
        return self.text.split("\n", 1)[0]

    @property
    def is_json(self) -> bool:
        """Return whether it begins like JSON."""
        if self.is_utf16 or self.is_binary:
            return False
        return self.text[:1] in "[{" and not self.text.startswith(_NO_JSON)

    @property
    def is_plain_text(self) -> bool:
        """Return whether it is text in UTF-8 that does not begin like JSON."""
        return not self.is_utf16 and not self.is_binary and not self.is_json
