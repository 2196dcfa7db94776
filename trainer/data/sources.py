"""`[data] sources` -> the files that hold documents, in an order that depends on their names
only.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from trainer.config.sections import BUILTIN
from trainer.data.bad_records import NO_FILE, UNREADABLE, BadRecords
from trainer.data.source_file import SourceFile

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = frozenset(
    (
        ".txt .text .md .markdown .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .log .srt "
        ".py .pyi .c .h .cc .cpp .hh .hpp .cs .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .pl .lua .jl .r "
        ".swift .m .sh .bash .sql .css .vim .el .lisp .hs .ml .f90"
    ).split()
)
COMPRESSED = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}


@dataclass
class ResolvedSources:
    """What `discover` found.

    Attributes:
        ignored: files of a folder that are no text by their suffix, by suffix.
        spans: of each source with new files, (source, first, last): its files are
        files[first:last].
        empty: sources in which no file was found.
    """

    files: list[SourceFile] = field(default_factory=list)
    bad: BadRecords = field(default_factory=BadRecords)
    ignored: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def discover(sources: tuple[str, ...], pulse: Callable[[], None] = lambda: None) -> ResolvedSources:
    """The files behind `sources`, in the order of the sources and sorted by name within one; each
    file once.

    A folder is walked recursively: text-like suffixes only, hidden names and links to folders
    passed over. A file that a glob or a path names is taken whatever its suffix. A source without a
    file counts among the bad records.
    """
    found, seen = ResolvedSources(), set()
    for source in sources:
        first, ignored, candidate = len(found.files), found.ignored.total(), None
        if source == BUILTIN:
            from trainer.data import builtin

            candidates = builtin.files()
        else:
            candidates = _files_of(os.path.abspath(os.path.expanduser(source)), found, pulse)
        for candidate in candidates:
            pulse()
            if candidate.path not in seen:
                seen.add(candidate.path)
                found.files.append(candidate)
        if first < len(found.files):
            found.spans.append((source, first, len(found.files)))
        if candidate is None:
            other = found.ignored.total() - ignored
            found.empty.append(source)
            found.bad.add(
                NO_FILE,
                source,
                reason=f"{other:,} files, none of them text by its suffix" if other else "",
            )
    return found


def _files_of(
    source: str, found: ResolvedSources, pulse: Callable[[], None]
) -> Iterator[SourceFile]:
    if os.path.isdir(source):
        yield from _walk(source, source, found, pulse)
    elif os.path.lexists(source) or not glob.has_magic(source):
        yield from _file(source, os.path.basename(source), found)
    else:
        fixed = _fixed_part(source)
        for match in sorted(glob.iglob(source, recursive=True)):
            pulse()
            if not os.path.isdir(match):
                yield from _file(match, os.path.relpath(match, fixed), found)
            elif not source.endswith("**"):  # the files below are matches themselves there
                yield from _walk(match, fixed, found, pulse)


def _walk(
    folder: str, base: str, found: ResolvedSources, pulse: Callable[[], None]
) -> Iterator[SourceFile]:
    """The text files below `folder`; their keys are relative to `base`."""
    names: list[str] = []

    def unreadable(error: OSError) -> None:
        found.bad.add(UNREADABLE, str(error.filename), reason=error.strerror or "")

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        pulse()
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in files
            if not name.startswith(".")
        ]
    for name in sorted(names):
        suffix = _suffixes(name)[0]
        if suffix in TEXT_SUFFIXES or suffix in JSONL_SUFFIXES:
            path = os.path.join(folder, name)
            yield from _file(path, name if base == folder else os.path.relpath(path, base), found)
        else:
            found.ignored[suffix or "no suffix"] += 1


def _file(path: str, key: str, found: ResolvedSources) -> Iterator[SourceFile]:
    try:
        status = os.stat(path)
    except OSError as error:
        found.bad.add(UNREADABLE, path, reason=error.strerror or "")
        return
    if not stat.S_ISREG(status.st_mode):
        found.bad.add(UNREADABLE, path, reason="not a regular file")
        return
    suffix, compression = _suffixes(path)
    yield SourceFile(
        path, key, status.st_size, status.st_mtime_ns, suffix in JSONL_SUFFIXES, compression
    )


def _suffixes(path: str) -> tuple[str, str]:
    """("suffix of the content", compression): "a.jsonl.gz" -> (".jsonl", "gz")."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSED.get(suffix, "")
    return (os.path.splitext(stem)[1] if compression else suffix), compression


def _fixed_part(pattern: str) -> str:
    """The folder in front of the first wildcard."""
    parts = pattern.split(os.sep)
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return os.sep.join(parts[:fixed]) or os.sep
