"""A program in a pseudo-terminal: what it writes and when, what a terminal would show of it, and
keys for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# A terminal answers whether it can show a whole frame at once (synchronised output, mode 2026).
_QUERY, _ANSWER = b"\x1b[?2026$p", b"\x1b[?2026;2$y"
FRAME_END = b"\x1b[?2026l"


class Terminal:
    """A pseudo-terminal with a process in it.

    Args:
        command: of the process; it leads a session of its own.
        synchronised: answer the question for synchronised output, as most terminals do.

    Attributes:
        output: all bytes that were read from the process.
        chunks: (monotonic seconds, CPU seconds of the process until then, bytes), as they came.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 100,
        rows: int = 30,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        synchronised: bool = True,
    ) -> None:
        self.columns, self.rows = columns, rows
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.output = bytearray()
        self.chunks: list[tuple[float, float, bytes]] = []
        self._synchronised = synchronised
        self._fed = 0
        self._screen: tuple[object, object] | None = None
        # An exported size would win over the terminal's own.
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            list(command),
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            cwd=cwd,
            env={**inherited, "TERM": "xterm-256color", **(environment or {})},
        )

    def read(self, seconds: float = 0.1) -> None:
        """Take what the process writes for so long, as a terminal does."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.take(left)

    def take(self, seconds: float) -> bytes:
        """The next bytes, or b"" where none come in time."""
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return b""
        data = b""
        with contextlib.suppress(OSError):  # EIO: the process is gone
            data = os.read(self.master, 65536)
        if not data:
            time.sleep(0.01)
            return b""
        self.chunks.append((time.monotonic(), self.cpu(), data))
        if self._synchronised and _QUERY in bytes(self.output[-len(_QUERY) :]) + data:
            os.write(self.master, _ANSWER)
        self.output += data
        return data

    def children(self) -> list[int]:
        """Processes that the process has started itself."""
        with contextlib.suppress(OSError):
            pid = self.process.pid
            return [
                int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            ]
        return []

    @property
    def screen(self) -> int:
        """The process that draws: the child of one that waits for it, else the process itself."""
        return next(iter(self.children()), self.process.pid)

    def cpu(self) -> float:
        """CPU seconds of the process, of its children and of all their threads until now, to the
        nanosecond; 0.0 once it is gone."""
        total = 0
        for pid in (self.process.pid, *self.children()):
            with contextlib.suppress(OSError):
                for task in os.scandir(f"/proc/{pid}/task"):
                    with contextlib.suppress(OSError):
                        total += int(Path(task.path, "schedstat").read_text().split()[0])
        return total / 1e9

    def memory(self, name: str = "VmHWM") -> float:
        """MB that the process that draws has in memory (VmRSS), or had at most (VmHWM)."""
        for line in Path(f"/proc/{self.screen}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e6
        return 0.0

    def until(self, text: str, seconds: float = 30.0) -> None:
        """Read until the output has `text`, in one piece as it was written."""
        self._until(lambda: text.encode() in self.output, repr(text), seconds)

    def shows(self, *texts: str, seconds: float = 30.0) -> None:
        """Read until all of `texts` stand on the screen, each in one row."""

        def there() -> bool:
            rows = self.display()
            return all(any(text in row for row in rows) for text in texts)

        self._until(there, str(texts), seconds)

    def _until(self, true: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            tail = bytes(self.output[-1500:])
            assert time.monotonic() < deadline, f"{what} never came: {self.display()} {tail!r}"
            assert self.process.poll() is None, f"the process has ended: {tail!r}"
            self.take(0.1)

    def display(self) -> list[str]:
        """The rows of the screen as they stand now."""
        if self._screen is None:
            self._screen = blank(self.columns, self.rows)
        screen, stream = self._screen
        stream.feed(bytes(self.output[self._fed :]))  # type: ignore[attr-defined]
        self._fed = len(self.output)
        return list(screen.display)  # type: ignore[attr-defined]

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        """The window is closed, the connection dropped."""
        for descriptor in (self.slave, self.master):
            if descriptor >= 0:
                os.close(descriptor)
        self.slave = self.master = -1

    def end(self) -> None:
        """Whatever is left of it."""
        self.process.kill()
        self.process.wait()
        self.close()

    def ends(self, seconds: float = 15.0, *, reading: bool = True) -> int:
        """Wait for the process; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the process did not end"
            if reading and self.master >= 0:
                self.take(0.05)
            else:
                time.sleep(0.05)
        return int(self.process.returncode)


def blank(columns: int, rows: int) -> tuple[object, object]:
    """A screen that shows nothing yet, and the stream that draws on it (pyte)."""
    import pyte

    screen = pyte.Screen(columns, rows)
    return screen, pyte.ByteStream(screen)
