"""The newest lines of what the ranks print: logs/*.log of a run, read as they grow, in bounded
memory.

Whatever a rank prints is harmless here: a line is cleaned, and of one of ten megabytes only the
beginning is kept.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from guardrail.core.files import open_file
from guardrail.core.format import clean_and_shorten

KEPT_LINES = 2000  # of all logs together
LINE_BYTES = 4000  # of one line that are looked at
CHUNK = 64 * 1024  # read of one log at one look; of what is further behind only the end is read
MAX_LOGS = 4096


@dataclass(frozen=True)
class PrintedLine:
    """One line. `source` is the number of the rank, or what else has a log: "supervisor",
    "elastic".
    """

    source: str
    text: str


class LogTail:
    """Reads what was added since the last look.

    Args:
        folder: of the logs; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: dict[str, _Log] = {}
        self._lines: deque[PrintedLine] = deque(maxlen=KEPT_LINES)

    @property
    def lines(self) -> tuple[PrintedLine, ...]:
        """Oldest first; those of one look stand together by log, since lines have no common
        clock.
        """
        return tuple(self._lines)

    def look(self) -> bool:
        """Read what is new; True if there is something. A log that cannot be read is passed
        over.
        """
        found = False
        try:
            with os.scandir(self._folder) as entries:
                names = [
                    entry.name
                    for entry in entries
                    if entry.name.endswith(".log") and entry.is_file()
                ]
        except OSError:
            return False
        for name in sorted(names, key=_order)[:MAX_LOGS]:
            log = self._logs.get(name)
            if log is None:
                log = self._logs[name] = _Log(self._folder / name, source=_source(name))
            for text in log.look():
                self._lines.append(PrintedLine(log.source, text))
                found = True
        return found


class _Log:
    def __init__(self, path: Path, *, source: str) -> None:
        self._path, self.source = path, source
        self._offset = -1  # bytes read; -1: never looked
        self._rest = b""  # a line that is not complete yet, its beginning
        self._skipping = False  # inside a line that is too long

    def look(self) -> list[str]:
        try:
            size = os.stat(self._path).st_size
            if size == self._offset:
                return []
            begin = 0 if size < self._offset else max(0, self._offset)  # it was cut: from the start
            if size - begin > CHUNK:
                # the line that we land in is torn
                begin, self._rest, self._skipping = size - CHUNK, b"", True
            with open_file(self._path) as file:
                file.seek(begin)
                data = file.read(CHUNK)
        except OSError:
            return []
        self._offset = begin + len(data)
        return list(self._lines_of(data))

    def _lines_of(self, data: bytes) -> list[str]:
        *whole, rest = data.split(b"\n")
        lines: list[str] = []
        for part in whole:
            line = b"" if self._skipping else self._rest + part
            if line.strip():
                lines.append(_shown(line))
            self._rest, self._skipping = b"", False
        if not self._skipping:
            self._rest += rest
            if len(self._rest) > LINE_BYTES:
                lines.append(_shown(self._rest))
                self._rest, self._skipping = b"", True
        return lines


def _shown(line: bytes) -> str:
    """One line for a person; of a progress bar, which returns to the start of its line, the last
    state.
    """
    last = next(
        (part for part in reversed(line[: 16 * LINE_BYTES].split(b"\r")) if part.strip()), b""
    )
    return clean_and_shorten(last[:LINE_BYTES].decode("utf-8", "replace"))


def _source(name: str) -> str:
    stem = name.removesuffix(".log")
    return clean_and_shorten(stem.removeprefix("rank-"), 20)


def _order(name: str) -> tuple[int, str]:
    stem = name.removesuffix(".log").removeprefix("rank-")
    return (int(stem), "") if stem.isascii() and stem.isdigit() and len(stem) < 9 else (-1, name)
