"""The newest lines of what the ranks print: logs/*.log of a run, in bounded memory.

A rank may print anything: each line is cleaned, and of a line of ten megabytes only the beginning is
kept.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from guardrail.core.files import open_file
from guardrail.core.format import clean_and_shorten

KEPT_LINES = 2000  # of all logs together
LINE_BYTES = 4000  # of one line that are kept
PROGRESS_BYTES = 16 * LINE_BYTES  # of one line that are searched for the last state of a bar
CHUNK = 64 * 1024  # bytes read of one log at once; of a larger addition only the end is read
MAX_LOGS = 4096


@dataclass(frozen=True)
class PrintedLine:
    """One line.

    Attributes:
        source: number of the rank, or what else has a log: "supervisor", "elastic".
    """

    source: str
    text: str


class LogTail:
    """Reads what was added to the logs since the last read.

    Args:
        folder: of the logs; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: dict[str, _Log] = {}
        self._lines: deque[PrintedLine] = deque(maxlen=KEPT_LINES)

    @property
    def lines(self) -> tuple[PrintedLine, ...]:
        """Oldest first; lines of one read are grouped by log, since they have no common clock."""
        return tuple(self._lines)

    def read_new_lines(self) -> bool:
        """Read what is new; return whether there is something. An unreadable log is skipped."""
        found = False
        for name in self._log_names():
            log = self._logs.get(name)
            if log is None:
                log = self._logs[name] = _Log(self._folder / name, source=_source_of(name))
            for text in log.read_new_lines():
                self._lines.append(PrintedLine(log.source, text))
                found = True
        return found

    def _log_names(self) -> list[str]:
        names: list[str] = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".log") and entry.is_file():
                        names.append(entry.name)
        except OSError:
            return []
        return sorted(names, key=_by_rank)[:MAX_LOGS]


class _Log:
    def __init__(self, path: Path, *, source: str) -> None:
        self._path, self.source = path, source
        self._offset = -1  # bytes read; -1: never read
        self._rest = b""  # the beginning of a line that is not complete yet
        self._skipping = False  # inside a line that is too long

    def read_new_lines(self) -> list[str]:
        try:
            size = os.stat(self._path).st_size
            if size == self._offset:
                return []
            begin = max(0, self._offset)
            if size < self._offset:
                begin = 0  # the file was cut: read it from its start
            if size - begin > CHUNK:
                # reading begins inside a line
                begin, self._rest, self._skipping = size - CHUNK, b"", True
            with open_file(self._path) as file:
                file.seek(begin)
                data = file.read(CHUNK)
        except OSError:
            return []
        self._offset = begin + len(data)
        return self._split_lines(data)

    def _split_lines(self, data: bytes) -> list[str]:
        *complete, rest = data.split(b"\n")
        lines: list[str] = []
        for part in complete:
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
    """Return one line as it is shown; of a progress bar, which returns to its start, the last
    state.
    """
    for state in reversed(line[:PROGRESS_BYTES].split(b"\r")):
        if state.strip():
            return clean_and_shorten(state[:LINE_BYTES].decode("utf-8", "replace"))
    return ""


def _source_of(name: str) -> str:
    stem = name.removesuffix(".log")
    return clean_and_shorten(stem.removeprefix("rank-"), 20)


def _by_rank(name: str) -> tuple[int, str]:
    """Sort other logs first, then those of the ranks by number."""
    stem = name.removesuffix(".log").removeprefix("rank-")
    if stem.isascii() and stem.isdigit() and len(stem) < 9:
        return (int(stem), "")
    return (-1, name)
