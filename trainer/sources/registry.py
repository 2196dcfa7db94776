"""The kinds of entries that `data.sources` can have."""

from __future__ import annotations

from trainer.sources.base import Source
from trainer.sources.files import FileSource
from trainer.sources.python_library import PythonLibrary

# A new source: its file in this folder, and its line here. The first one that claims an entry reads
# it; files claim every entry that is left.
SOURCES: tuple[Source, ...] = (
    PythonLibrary(),
    FileSource(),
)


def source_of_entry(entry: str) -> Source:
    """Return the source that reads an entry of `data.sources`.

    Raises KeyError for an entry "builtin:NAME" that no source claims.
    """
    for source in SOURCES:
        if source.claims(entry):
            return source
    raise KeyError(entry)


def find_source(name: str) -> Source:
    """Return the source of this name. Raises KeyError for a name that is not registered."""
    for source in SOURCES:
        if source.name == name:
            return source
    raise KeyError(name)


def builtin_names() -> list[str]:
    """Return the entries that need no file, such as "builtin:python"."""
    return [source.name for source in SOURCES if source.name.startswith("builtin:")]
