"""What the trainer needs to know of a source of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from trainer.sources.bad_records import BadRecords
from trainer.sources.source_file import SourceFile


@dataclass
class ResolvedSources:
    """What was found for the entries of `data.sources`.

    Attributes:
        files: of all entries, in order, each once.
        bad: files that cannot be used.
        ignored: files of a folder whose suffix is not that of text, counted by suffix.
        spans: (entry, first, last) of each entry with new files: those are files[first:last].
        empty: entries for which no file was found.
    """

    files: list[SourceFile] = field(default_factory=list)
    bad: BadRecords = field(default_factory=BadRecords)
    ignored: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Source(ABC):
    """One kind of entry in `data.sources`.

    Attributes:
        name: as `SourceFile.source` has it.
        help: which entries it reads, for the documentation.
        counts_bad_records: whether its unusable documents are reported to the user.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    counts_bad_records: ClassVar[bool] = True

    @abstractmethod
    def claims(self, entry: str) -> bool:
        """Return whether an entry of `data.sources` belongs to this source."""

    @abstractmethod
    def check(self, entry: str, *, base: Path, key: str) -> None:
        """Raise ConfigError for an entry that cannot work.

        Args:
            base: folder that relative paths start from.
            key: of the entry, such as "data.sources[0]".
        """

    def resolve(self, entry: str, *, base: Path) -> str:
        """Return the entry as it is stored with the run, independent of the working directory."""
        return entry

    def version(self) -> str:
        """Return what the text depends on, besides names, sizes and dates of the files."""
        return ""

    @abstractmethod
    def find(
        self, entry: str, found: ResolvedSources, pulse: Callable[[], None]
    ) -> Iterator[SourceFile]:
        """Yield the files of an entry, in an order that depends on their names only.

        Args:
            found: takes the files that are ignored or cannot be used.
            pulse: to be called often; may raise Interrupted.
        """

    @abstractmethod
    def open(self, file: SourceFile) -> IO[bytes]:
        """Open one of the files that `find` gave, still compressed. Raises OSError."""
