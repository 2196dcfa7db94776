"""`data.sources` -> the files that hold documents, in an order that depends on their names only."""

from __future__ import annotations

from collections.abc import Callable

from trainer.sources.bad_records import NO_FILE
from trainer.sources.base import ResolvedSources
from trainer.sources.registry import source_of_entry


def discover(sources: tuple[str, ...], pulse: Callable[[], None] = lambda: None) -> ResolvedSources:
    """Return the files of `sources`: entry by entry, sorted by name within one, each file once.

    An entry without a file counts as a bad record.

    Args:
        pulse: called often; may raise Interrupted.
    """
    found, seen = ResolvedSources(), set()
    for entry in sources:
        first, ignored_before = len(found.files), found.ignored.total()
        is_empty = True
        for file in source_of_entry(entry).find(entry, found, pulse):
            pulse()
            is_empty = False
            if file.path not in seen:
                seen.add(file.path)
                found.files.append(file)
        if first < len(found.files):
            found.spans.append((entry, first, len(found.files)))
        if is_empty:
            found.empty.append(entry)
            found.bad.add(NO_FILE, entry, reason=_ignored_files(found, ignored_before))
    return found


def _ignored_files(found: ResolvedSources, before: int) -> str:
    ignored = found.ignored.total() - before
    if not ignored:
        return ""
    return f"{ignored:,} files, none of them text by its suffix"
