"""Finds the recorded runs at the paths of a command line, whatever program wrote them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guardrail.backtest.importers import registry
from guardrail.backtest.importers.base import Importer, Scope
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError
from guardrail.core.packages import MissingPackage, require_package
from guardrail.core.text import clean_text, escape_text

# A search skips files with these suffixes without opening them: they are no logs, and large or
# many.
_NO_LOG = frozenset(
    ".py .pyc .sh .toml .yaml .yml .md .html .png .jpg .svg .pdf .pt .pth .ckpt .bin .safetensors"
    " .npy .npz .gz .zst .zip .tar .whl .so .db .lock .pid".split()
)
# An empty file with one of these suffixes is reported. Other empty files in a folder are ignored.
_LOG_SUFFIXES = (".csv", ".jsonl", ".log")

Read = Callable[[Mapping[str, str]], list[Log]]


@dataclass(frozen=True)
class Source:
    """Something that holds recorded runs.

    Attributes:
        read: signal -> column that the user chose, to the runs. Raises DataError with one sentence,
            or OSError.
    """

    path: str
    read: Read


def find_sources(paths: Sequence[str]) -> Iterator[Source]:
    """Give what is at each path. Folders are searched in order of their names.

    A path that holds nothing gives a source whose `read` raises the reason. So the other paths can
    still be read.
    """
    for given in paths:
        path = Path(given)
        try:
            if path.is_dir():
                found = list(_search_folder(path))
            else:
                found = _source_of_file(LogFile.open(path, is_named=True))
        except OSError as error:
            reason = error.strerror or "no file can have this name"
            found = [_refuse_path(given, reason, kind="unreadable")]
        except ValueError:
            found = [_refuse_path(given, "no file can have this name", kind="unreadable")]
        if not found:
            found = [_refuse_path(given, "no recorded run in this folder", kind="no_run")]
        yield from found


def _refuse_path(path: str, reason: str, *, kind: str) -> Source:
    def read(columns: Mapping[str, str]) -> list[Log]:
        raise DataError(f"{escape_text(path, 300)}: {reason}", kind=kind)

    return Source(path, read)


def _source_of_file(file: LogFile) -> list[Source]:
    """Return the source of a file; none for a file in a folder that is no log."""
    shown = clean_text(str(file.path))
    if file.is_empty:
        if file.is_named or file.path.suffix.lower() in _LOG_SUFFIXES:
            return [_refuse_path(shown, "empty", kind="empty")]
        return []
    for importer in registry.IMPORTERS:
        if importer.recognises(file):
            return [_make_source(importer, file.path, shown=shown)]
    if file.is_named:
        reason = "not a log in any format that guardrail knows"
        return [_refuse_path(shown, reason, kind="unknown_format")]
    return []


def _make_source(importer: Importer, path: Path, *, shown: str) -> Source:
    def read(columns: Mapping[str, str]) -> list[Log]:
        _check_package(importer, shown)
        return importer.read(path, clean_text(shown), columns)

    return Source(shown, read)


def _source_of_folder(importer: Importer, paths: Sequence[Path], *, folder: str) -> Source:
    def read(columns: Mapping[str, str]) -> list[Log]:
        _check_package(importer, folder)
        return importer.read_together(paths, clean_text(folder), columns)

    return Source(folder, read)


def _check_package(importer: Importer, shown: str) -> None:
    """Raise DataError if the package that an importer needs is missing."""
    try:
        if importer.package:
            require_package(importer.package, f"{clean_text(shown)}: the importer of its format")
    except MissingPackage as error:
        raise DataError(str(error), kind="missing_package") from error


def _search_folder(root: Path) -> Iterator[Source]:
    """Give the sources below a folder."""
    importer = _importer_of_folder(root)
    if importer is not None:
        yield _make_source(importer, root, shown=str(root))
        return
    in_search: dict[Importer, list[Path]] = {}
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders.sort()
        for name in list(subfolders):
            if name.startswith(".") or name == "__pycache__" or _holds_only_texts(here, name):
                subfolders.remove(name)
                continue
            importer = _importer_of_folder(here / name)
            if importer is not None:
                subfolders.remove(name)
                yield _make_source(importer, here / name, shown=str(here / name))
        in_folder: dict[Importer, list[Path]] = {}
        for path in sorted(here / name for name in names):
            if path.name.startswith(".") or path.suffix.lower() in _NO_LOG or not path.is_file():
                continue
            try:
                file = LogFile.open(path, is_named=False)
            except OSError as error:
                yield _refuse_path(str(path), error.strerror or str(error), kind="unreadable")
                continue
            waiting = _importer_that_waits(file)
            if waiting is None:
                yield from _source_of_file(file)
            elif waiting.scope is Scope.FOLDER:
                in_folder.setdefault(waiting, []).append(path)
            else:
                in_search.setdefault(waiting, []).append(path)
        for importer, paths in in_folder.items():
            yield _source_of_folder(importer, paths, folder=folder)
    for importer, paths in in_search.items():
        for path in importer.choose(paths):
            yield _make_source(importer, path, shown=str(path))


def _importer_of_folder(folder: Path) -> Importer | None:
    for importer in registry.IMPORTERS:
        if importer.recognises_folder(folder):
            return importer
    return None


def _importer_that_waits(file: LogFile) -> Importer | None:
    for importer in registry.IMPORTERS:
        if importer.waits(file):
            return importer
    return None


def _holds_only_texts(folder: Path, name: str) -> bool:
    """Return whether a subfolder holds the texts of guardrail's own event files, and no curve."""
    return name == "journal" and (folder / "position.json").is_file()
