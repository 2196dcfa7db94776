"""`builtin:python`: source and documentation of the standard library of this Python.

It is real text on every machine, about 12 MB, in the same order for every process of one
installation: the .py files, the topics of `help()`, and the docstrings of the compiled modules.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, ClassVar

from trainer.sources.base import ResolvedSources, Source
from trainer.sources.files import open_regular_file
from trainer.sources.source_file import SourceFile

BUILTIN = "builtin:python"
# Not of the library itself, or different between builds of the same version.
_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "__phello__",
}
_FILES = {"pydoc_data/topics.py"}  # each of its topics is a document instead
_PREFIXES = ("config-", "_sysconfigdata")


class PythonLibrary(Source):
    """The text of the running interpreter's library."""

    name = BUILTIN
    help = "source and documentation of Python's library, about 12 MB; needs no download"
    # A file of the interpreter in another encoding is of no interest to the user.
    counts_bad_records: ClassVar[bool] = False

    def claims(self, entry: str) -> bool:
        """See `Source.claims`."""
        return entry == BUILTIN

    def check(self, entry: str, *, base: Path, key: str) -> None:
        """See `Source.check`: the library is always there."""

    def version(self) -> str:
        """See `Source.version`."""
        return sys.version

    def find(
        self, entry: str, found: ResolvedSources, pulse: Callable[[], None]
    ) -> Iterator[SourceFile]:
        """See `Source.find`. Texts that are no file have a path "builtin:python/..."."""
        root = sysconfig.get_path("stdlib")
        for name in sorted(_python_files(root)):
            path = os.path.join(root, name)
            status = os.stat(path)
            if status.st_size:
                yield SourceFile(
                    path, f"{BUILTIN}/{name}", status.st_size, status.st_mtime_ns, source=BUILTIN
                )
        for name, text in sorted(_documents().items()):
            yield SourceFile(name, name, len(text), source=BUILTIN)

    def open(self, file: SourceFile) -> IO[bytes]:
        """See `Source.open`."""
        if file.path.startswith(BUILTIN):
            return BytesIO(_documents()[file.path])
        return open_regular_file(file.path)


def _python_files(root: str) -> Iterator[str]:
    """Yield the names of the library's .py files, relative to `root`."""
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_of_library(name, but=_FOLDERS)]
        for name in names:
            relative = os.path.relpath(os.path.join(parent, name), root)
            if name.endswith(".py") and _is_of_library(name) and relative not in _FILES:
                yield relative


def _is_of_library(name: str, *, but: set[str] | frozenset[str] = frozenset()) -> bool:
    return name not in but and not name.startswith(_PREFIXES)


@functools.cache
def _documents() -> dict[str, bytes]:
    """Return the texts that are no file: path -> UTF-8."""
    texts = {f"{BUILTIN}/topics/{name}": text for name, text in _help_topics().items()}
    for name in sys.builtin_module_names:
        texts[f"{BUILTIN}/doc/{name}"] = _docstrings(name)
    return {name: text.encode("utf-8") for name, text in texts.items() if text.strip()}


def _help_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return {}
    return dict(topics)


def _docstrings(module_name: str) -> str:
    """Return the docstrings of a compiled module, its functions, classes and methods.

    No repr is part of the text: it would hold a memory address.
    """
    if module_name in ("__main__", "sys"):  # programs replace the hooks in `sys`
        return ""
    module = importlib.import_module(module_name)
    entries = [(module_name, module.__doc__)]
    for name, value in sorted(vars(module).items()):
        # Only what is compiled in: `site` and others add names to `builtins`, or replace
        # `__import__`.
        if name.startswith("__"):
            continue
        if inspect.isbuiltin(value):
            entries.append((f"{module_name}.{name}", value.__doc__))
        elif isinstance(value, type) and value.__module__ == module_name:
            entries.append((f"{module_name}.{name}", value.__doc__))
            members = {key: item for key, item in vars(value).items() if not key.startswith("_")}
            for key in sorted(members):
                entries.append((f"{module_name}.{name}.{key}", members[key].__doc__))
    texts = [f"{name}\n{doc}" for name, doc in entries if isinstance(doc, str) and doc.strip()]
    return "\n\n".join(texts)
