"""journal.jsonl: every event of a run, one JSON object per line, synced before it takes effect.

A part of `guardrail.rundir.run_directory`: callers go through `RunDirectory.write_event` and
`RunDirectory.events`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from guardrail.core.errors import ExitCode
from guardrail.core.events.event import FIXED, Event
from guardrail.core.events.kinds import make_event
from guardrail.core.events.run_state import TURNS, Ended, Note, Restarted, Started
from guardrail.core.files import (
    FILE_MODE,
    encode_json,
    open_file,
    read_file,
    refuse_special,
    sync_folder,
)
from guardrail.core.records.status import Phase

LOCK_SECONDS = 30.0  # a writer that holds the lock longer is stopped, or dead on another host
EXIT_CODES = {
    Phase.FINISHED: ExitCode.FINISHED,
    Phase.STOPPED: ExitCode.INTERRUPTED,
    Phase.HALTED: ExitCode.HALTED,
    Phase.FAILED: ExitCode.WORKERS_FAILED,
}
_TAIL = 64 * 1024
_DECODER = msgspec.json.Decoder()


def append_event(path: Path, event: Event) -> Event:
    """Append one event and sync it. Safe between processes and threads.

    A machine that crashes while writing leaves an incomplete last line. It is completed or cut off
    first; a cut is noted in the journal.

    Args:
        event: its `data` holds all fields beside the fixed ones, as `with_data` returns it.

    Returns:
        The event with its number.

    Raises:
        OSError: the event is not on disk, not even in part (a full disk, a lost file system).
        ValueError: `data` contains one of the fixed fields.
    """
    clash = [name for name in event.data if name in FIXED]
    if clash:
        raise ValueError(f"{', '.join(clash)}: a fixed field of every journal line, not data")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        refuse_special(descriptor, path)
        _lock(descriptor)
        size = os.fstat(descriptor).st_size
        if size == 0:
            sync_folder(path.parent)
        lines, seq, keep = _mend(descriptor, size, timeline=event.timeline, at=event.time)
        written = msgspec.structs.replace(event, seq=seq + 1)
        _write(descriptor, lines + _line(written), keep=keep, size=size)
        return written
    finally:
        os.close(descriptor)


def read_events(path: Path, *, after: int = 0) -> list[Event]:
    """Return all complete events with seq > `after`. Lines that are not events are ignored."""
    try:
        data = read_file(path)
    except FileNotFoundError:
        return []
    return [event for event in parse(data)[0] if event.seq > after]


def end_of(path: Path) -> tuple[int, int]:
    """Return (seq of the last event, bytes of the complete lines); (0, 0): there are none.

    Only the end of the file is read.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size - _TAIL)
            while True:
                file.seek(start)
                tail = file.read(size - start)
                first = tail.find(b"\n") + 1 if start else 0
                events, used = parse(tail[first:])
                if events or start == 0:
                    return (events[-1].seq if events else 0), start + first + used
                start = max(0, start - 2 * (size - start))
    except FileNotFoundError:
        return 0, 0


def parse(data: bytes) -> tuple[list[Event], int]:
    """Return the events of the complete lines in `data`, and the bytes of those lines."""
    events, end, _ = parse_counted(data)
    return events, end


def parse_counted(data: bytes) -> tuple[list[Event], int, int]:
    """Return the same as `parse`, and how many complete lines are not events."""
    end = data.rfind(b"\n") + 1
    lines = [line for line in data[:end].split(b"\n") if line.strip()]
    events = [event for event in map(_event, lines) if event is not None]
    return events, end, len(lines) - len(events)


def last_turn(events: Sequence[Event]) -> Started | Restarted | Ended | None:
    """Return the newest event that started or ended the run; None: there is none."""
    for event in reversed(events):
        if isinstance(event, TURNS):
            return event
    return None


def outcome_of(event: Ended) -> tuple[Phase, ExitCode] | None:
    """Return how the run ended; None: the event does not contain it."""
    try:
        event.check_readable("exit_code")
        phase = Phase(event.phase)
        if event.exit_code is None:
            return phase, EXIT_CODES[phase]
        return phase, ExitCode(event.exit_code)
    except (KeyError, ValueError):
        return None


def _event(line: bytes) -> Event | None:
    try:
        fields = _DECODER.decode(line)
        if not isinstance(fields, dict) or "seq" not in fields or "time" not in fields:
            return None
        return make_event(fields)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _line(event: Event) -> bytes:
    return encode_json(event.all_fields()) + b"\n"


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    pause = 0.001
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(
                    errno.EDEADLK, "another process holds the journal and does not let go"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


def _mend(descriptor: int, size: int, *, timeline: int, at: float) -> tuple[bytes, int, int]:
    """Return what to write before the next event, the last seq, and the bytes of the file to keep.

    Both repair an incomplete last line.
    """
    start = max(0, size - _TAIL)
    while True:
        tail = os.pread(descriptor, size - start, start)
        complete = tail
        if start > 0:
            complete = tail.partition(b"\n")[2]  # the first line has lost its beginning
        events, end = parse(complete)
        if events or start == 0:
            break
        start = max(0, start - 2 * (size - start))
    seq = events[-1].seq if events else 0
    torn = complete[end:]
    if not torn:
        return b"", seq, size
    parsed = _event(torn)
    if parsed is not None:
        # Only its newline is missing. The line was never acknowledged, but it is complete.
        return b"\n", parsed.seq, size
    note = Note(
        seq=seq + 1,
        time=at,
        timeline=timeline,
        message=f"cut off {len(torn)} bytes of a line that was never finished",
    )
    return _line(note), note.seq, size - len(torn)


def _write(descriptor: int, data: bytes, *, keep: int, size: int) -> None:
    if keep < size:
        os.ftruncate(descriptor, keep)
    try:
        written = os.write(descriptor, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, keep)
        raise
