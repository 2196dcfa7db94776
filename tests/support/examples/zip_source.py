"""Example of a data source: `data.sources = ["zip:PATH"]` reads the members of a zip archive.
Register it with one line in `trainer.sources.registry.SOURCES`, before `FileSource`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from guardrail.core.errors import ConfigError
from trainer.sources.base import ResolvedSources, Source
from trainer.sources.source_file import SourceFile

PREFIX = "zip:"


class ZipSource(Source):
    """Each member of the archive is one document."""

    name = "zip"
    help = "`zip:PATH`: the members of a zip archive, one document each"

    def claims(self, entry: str) -> bool:
        return entry.startswith(PREFIX)

    def check(self, entry: str, *, base: Path, key: str) -> None:
        if not zipfile.is_zipfile(_archive(self.resolve(entry, base=base))):
            raise ConfigError("a zip archive", key=key, value=entry)

    def resolve(self, entry: str, *, base: Path) -> str:
        return f"{PREFIX}{base / os.path.expanduser(_archive(entry))}"

    def find(
        self, entry: str, found: ResolvedSources, pulse: Callable[[], None]
    ) -> Iterator[SourceFile]:
        path = _archive(entry)
        changed = os.stat(path).st_mtime_ns
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                pulse()
                size = archive.getinfo(member).file_size
                yield SourceFile(f"{path}!{member}", member, size, changed, source=self.name)

    def open(self, file: SourceFile) -> IO[bytes]:
        path, _, member = file.path.partition("!")
        with zipfile.ZipFile(path) as archive:
            return archive.open(member)


def _archive(entry: str) -> str:
    return entry.removeprefix(PREFIX)
