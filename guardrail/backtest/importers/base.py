"""The interface of an importer: what reads recorded runs of one format.

An importer is one class in one file, listed in `registry.IMPORTERS`. It recognises its
format by the content of a file, never by its name alone. `names.py` finds the signals among its
columns. An importer that reads records as dictionaries needs only `jsonlines.log_from_records`.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.recorded_log import Log


class Scope(enum.Enum):
    """Which files that a search finds belong together."""

    FILE = "file"  # each file for itself
    FOLDER = "folder"  # the files of one folder are one run
    SEARCH = "search"  # `choose` picks among all files that the search finds


class Importer(abc.ABC):
    """Reads one format.

    The texts are those of `guardrail backtest --help` and of docs/backtest.md.
    """

    name: ClassVar[str]
    """One word that no other importer has."""

    reads: ClassVar[str]
    """What it reads, in the plural: "CSV and TSV files"."""

    recognised_by: ClassVar[str]
    """By what it recognises its format: "a header line that names a signal"."""

    package: ClassVar[str] = ""
    """The optional package that it needs, one of `core.packages.EXTRA_OF`; "" for none."""

    scope: ClassVar[Scope] = Scope.FILE

    @abc.abstractmethod
    def recognises(self, file: LogFile) -> bool:
        """Return whether this file has the format. The first importer that says so reads it.

        A file that the user named (`file.is_named`) is a log, so a resemblance is enough. One that
        a search found may be anything.
        """

    @abc.abstractmethod
    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        """Return the runs that are recorded in a file.

        Args:
            shown: its path in messages, and as `Log.path`.
            columns: signal -> column that the user chose, see `names.Chooser`.

        Raises:
            DataError: one sentence that begins with `shown`. A file that is cut off is no error.
            OSError: the file cannot be read.
        """

    def read_together(
        self, paths: Sequence[Path], shown: str, columns: Mapping[str, str]
    ) -> list[Log]:
        """Return the run that the files of one folder record. For `Scope.FOLDER`."""
        raise NotImplementedError

    def choose(self, paths: Sequence[Path]) -> list[Path]:
        """Return those that are read, of all files of this format. For `Scope.SEARCH`."""
        return list(paths)

    def waits(self, file: LogFile) -> bool:
        """Return whether a search sets this file aside for `read_together` or `choose`."""
        return self.scope is not Scope.FILE and self.recognises(file)

    def recognises_folder(self, folder: Path) -> bool:
        """Return whether this folder is one recorded run. Then `read` gets the folder."""
        return False
