"""LOG... on a command line -> the runs that are recorded there, whatever wrote them. Formats are
told by content.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from guardrail.backtest.importers import (
    delimited,
    event_files,
    jsonlines,
    run_directory,
    text_logs,
    trainer_state,
    wandb_files,
)
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError, RunDirectoryError
from guardrail.core.text import clean_text, escape_text
from guardrail.rundir.run_directory import RunDirectory

HEAD = 64 * 1024
# In a folder these are passed over without a look: what is no log, and is large or many.
_NO_LOG = frozenset(
    ".py .pyc .sh .toml .yaml .yml .md .html .png .jpg .svg .pdf .pt .pth .ckpt .bin .safetensors .npy .npz .gz .zst "
    ".zip .tar .whl .so .db .lock .pid".split()
)

Read = Callable[[Mapping[str, str]], list[Log]]


@dataclass(frozen=True)
class Source:
    """Something that holds recorded runs. `read(columns)` gives them, or raises DataError with one
    sentence.
    """

    path: str
    read: Read


def sources(paths: Sequence[str]) -> Iterator[Source]:
    """What is at each path; folders are searched, in order of their names.

    A path that holds nothing gives a source whose `read` says why, so that the others can be read
    all the same.
    """
    for given in paths:
        path = Path(given)
        try:
            found = list(_in_folder(path)) if path.is_dir() else [_file(path, named=True)]
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            found = [
                _refusal(given, getattr(error, "strerror", None) or "no file can have this name")
            ]
        if not found:
            found = [_refusal(given, "no recorded run in this folder")]
        yield from (source for source in found if source is not None)


def _refusal(path: str, why: str) -> Source:
    def read(columns: Mapping[str, str]) -> list[Log]:
        raise DataError(f"{escape_text(path, 300)}: {why}")

    return Source(path, read)


def _in_folder(root: Path) -> Iterator[Source]:
    if _is_run(root):
        yield _run(root)
        return
    states: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders.sort()
        for name in list(subfolders):
            if name.startswith(".") or name == "__pycache__" or _holds_texts(here, name):
                subfolders.remove(name)
            elif _is_run(here / name):
                subfolders.remove(name)
                yield _run(here / name)
        events: list[Path] = []
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or path.suffix.lower() in _NO_LOG or not path.is_file():
                continue
            try:
                head = _head(path)
            except OSError as error:
                yield _refusal(str(path), error.strerror or str(error))
                continue
            if event_files.is_event_file(head):
                events.append(path)
            elif name == "trainer_state.json":
                states.append(path)
            elif (source := _file(path, named=False)) is not None:
                yield source
        if events:
            yield _events(events, str(here))
    for path in trainer_state.newest(states):
        yield Source(str(path), partial(_read_trainer_state, path))


def _read_trainer_state(path: Path, columns: Mapping[str, str]) -> list[Log]:
    return trainer_state.read(path, clean_text(str(path)), columns)


def _file(path: Path, *, named: bool) -> Source | None:
    """None for a file of a folder that is no log.

    Args:
        named: the file itself was asked for, so it is read as what it most resembles.
    """
    shown = clean_text(str(path))
    head = _head(path)
    reader = _reader(path, head, named=named)
    if reader is None:
        return None
    if isinstance(reader, str):
        return _refusal(shown, reader)
    return Source(shown, lambda columns: reader(path, shown, columns))


Reader = Callable[[Path, str, Mapping[str, str]], list[Log]]


def _reader(path: Path, head: bytes, *, named: bool) -> Reader | str | None:
    """The reader of a file, why there is none, or None if nobody asked for this file."""
    if not head.strip(b"\0\r\n\t "):
        return "empty" if named or path.suffix.lower() in (".csv", ".jsonl", ".log") else None
    if event_files.is_event_file(head):
        return lambda path, shown, columns: event_files.read([path], shown, columns)
    if head.startswith(wandb_files.MAGIC):
        return wandb_files.read
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return text_logs.read
    if _is_binary(head):
        return "not a log in any format that I know" if named else None
    text = head.decode("utf-8-sig", "replace").lstrip()
    first = text.split("\n", 1)[0]
    if text[:1] in "[{" and not text.startswith(("{'", "[rank", "[202")):
        if '"log_history"' in text or path.name == "trainer_state.json":
            return trainer_state.read
        if named or _holds_records(first):
            return jsonlines.read
        return None
    if _is_table(text, first, named=named):
        return delimited.read
    if named or text_logs.format_of(path, lines=text_logs.LOOK) is not None:
        return text_logs.read
    return None


def _is_binary(head: bytes) -> bool:
    """Zeros at the end, as a crash leaves them, are no sign of it."""
    data = head.rstrip(b"\0")
    start = data[:4096]
    return data.count(0) > 0 or 50 * sum(byte < 9 or 13 < byte < 27 for byte in start) > len(start)


def _holds_records(line: str) -> bool:
    from guardrail.backtest.importers.names import rank

    try:
        record = jsonlines.loads(line.rstrip("\r\n, "))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(
        rank(name) is not None for name in jsonlines.flat(record)
    )


def _is_table(text: str, first: str, *, named: bool) -> bool:
    """Whether a file that begins with this text, and this line, is a table with a header."""
    # "iter 0: loss nan, time 3ms" has commas too
    if delimited.header(first) is None or text_logs.is_record(first):
        return False
    return _names_a_signal(first) or (named and delimited.is_table(text))


def _names_a_signal(line: str) -> bool:
    from guardrail.backtest.importers.names import rank

    found = delimited.header(line)
    return found is not None and any(
        rank(name.rsplit(" - ", 1)[-1]) is not None for name in found[1]
    )


def _events(paths: list[Path], folder: str) -> Source:
    return Source(folder, lambda columns: event_files.read(paths, clean_text(folder), columns))


def _holds_texts(folder: Path, name: str) -> bool:
    """The event files of a run of guardrail: those of this subfolder hold texts alone."""
    return name == "journal" and (folder / "position.json").is_file()


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.json").is_file() and (folder / "metrics.bin").is_file()


def _run(folder: Path) -> Source:
    def read(columns: Mapping[str, str]) -> list[Log]:
        try:
            return [run_directory.read(RunDirectory.open(folder), clean_text(str(folder)))]
        except RunDirectoryError as error:
            raise DataError(str(error)) from error

    return Source(str(folder), read)


def _head(path: Path) -> bytes:
    """OSError also for what is neither a file nor a folder: a pipe or a device may never end, and
    is read twice.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "neither a file nor a folder")
    with path.open("rb") as file:
        return file.read(HEAD)
