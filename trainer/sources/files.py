"""Files, folders and globs."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from guardrail.core.errors import ConfigError
from guardrail.core.files import why_unreachable
from trainer.sources.bad_records import UNREADABLE
from trainer.sources.base import ResolvedSources, Source
from trainer.sources.source_file import SourceFile

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = frozenset(
    (
        ".txt .text .md .markdown .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml "
        ".ini .cfg .log .srt .py .pyi .c .h .cc .cpp .hh .hpp .cs .java .kt .scala .js .jsx .ts "
        ".tsx .go .rs .rb .php .pl .lua .jl .r .swift .m .sh .bash .sql .css .vim .el .lisp .hs "
        ".ml .f90"
    ).split()
)
COMPRESSED = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}


class FileSource(Source):
    """The files of a path or a glob.

    A folder is walked recursively. Files without a suffix of text, hidden names and links to
    folders are ignored. A file that a path or a glob names is read whatever its suffix.
    """

    name = "files"
    help = (
        "a file, a folder or a glob; `.jsonl` has one document per line, other text one per file, "
        "each also with `.gz` or `.zst`"
    )

    def claims(self, entry: str) -> bool:
        """See `Source.claims`."""
        return not entry.startswith("builtin:")

    def check(self, entry: str, *, base: Path, key: str) -> None:
        """See `Source.check`."""
        path = self.resolve(entry, base=base)
        if os.path.exists(path) or any(True for _ in glob.iglob(path, recursive=True)):
            return
        raise ConfigError(
            "an existing file, folder or glob with matches",
            key=key,
            value=entry,
            hint=why_unreachable(Path(path)),
        )

    def resolve(self, entry: str, *, base: Path) -> str:
        """See `Source.resolve`."""
        return str(base / os.path.expanduser(entry))

    def find(
        self, entry: str, found: ResolvedSources, pulse: Callable[[], None]
    ) -> Iterator[SourceFile]:
        """See `Source.find`."""
        path = os.path.abspath(os.path.expanduser(entry))
        if os.path.isdir(path):
            yield from _walk_folder(path, path, found, pulse)
        elif os.path.lexists(path) or not glob.has_magic(path):
            yield from _take_file(path, os.path.basename(path), found)
        else:
            yield from _match_glob(path, found, pulse)

    def open(self, file: SourceFile) -> IO[bytes]:
        """See `Source.open`."""
        return open_regular_file(file.path)


def open_regular_file(path: str) -> IO[bytes]:
    """Open a file for reading. Raises OSError, also for what is no regular file."""
    # Without blocking: a pipe may have taken the file's place since it was found.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    raw = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raw.close()
        raise OSError("not a regular file")
    return raw


def _match_glob(
    pattern: str, found: ResolvedSources, pulse: Callable[[], None]
) -> Iterator[SourceFile]:
    fixed = _fixed_part(pattern)
    for match in sorted(glob.iglob(pattern, recursive=True)):
        pulse()
        if not os.path.isdir(match):
            yield from _take_file(match, os.path.relpath(match, fixed), found)
        elif not pattern.endswith("**"):  # there, the files below are matches themselves
            yield from _walk_folder(match, fixed, found, pulse)


def _walk_folder(
    folder: str, base: str, found: ResolvedSources, pulse: Callable[[], None]
) -> Iterator[SourceFile]:
    """Yield the text files below `folder`; their keys are relative to `base`."""
    for name in sorted(_names_below(folder, found, pulse)):
        suffix = _split_suffixes(name)[0]
        if suffix not in TEXT_SUFFIXES and suffix not in JSONL_SUFFIXES:
            found.ignored[suffix or "no suffix"] += 1
            continue
        path = os.path.join(folder, name)
        key = name
        if base != folder:
            key = os.path.relpath(path, base)
        yield from _take_file(path, key, found)


def _names_below(folder: str, found: ResolvedSources, pulse: Callable[[], None]) -> list[str]:
    """Return the names of the files below `folder`, relative to it, without hidden ones."""

    def note_unreadable(error: OSError) -> None:
        found.bad.add(UNREADABLE, str(error.filename), reason=error.strerror or "")

    names: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=note_unreadable):
        pulse()
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [os.path.join(parent, name) for name in files if not name.startswith(".")]
        names += [os.path.relpath(path, folder) for path in visible]
    return names


def _take_file(path: str, key: str, found: ResolvedSources) -> Iterator[SourceFile]:
    """Yield the file if it is a regular file that can be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        found.bad.add(UNREADABLE, path, reason=error.strerror or "")
        return
    if not stat.S_ISREG(status.st_mode):
        found.bad.add(UNREADABLE, path, reason="not a regular file")
        return
    suffix, compression = _split_suffixes(path)
    is_jsonl = suffix in JSONL_SUFFIXES
    yield SourceFile(path, key, status.st_size, status.st_mtime_ns, is_jsonl, compression)


def _split_suffixes(path: str) -> tuple[str, str]:
    """Return (suffix of the content, compression): "a.jsonl.gz" -> (".jsonl", "gz")."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSED.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    return suffix, compression


def _fixed_part(pattern: str) -> str:
    """Return the folder before the first wildcard."""
    parts = pattern.split(os.sep)
    first = 0
    while not glob.has_magic(parts[first]):
        first += 1
    return os.sep.join(parts[:first]) or os.sep
