"""`builtin:python`: source and documentation of the running interpreter's standard library.

Real text on every machine, some 12 MB, in the same order for every process of one installation: the
.py files, the topics of `help()`, and the docstrings of the modules that are compiled in.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator

from trainer.config.sections import BUILTIN
from trainer.data.source_file import SourceFile

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
_FILES = {"pydoc_data/topics.py"}  # taken as documents of their own instead
_PREFIXES = ("config-", "_sysconfigdata")


def files() -> Iterator[SourceFile]:
    """All of it as source files; those without a file of their own are read by `read`."""
    root = sysconfig.get_path("stdlib")
    for name in sorted(_python_files(root)):
        path = os.path.join(root, name)
        status = os.stat(path)
        if status.st_size:
            yield SourceFile(path, f"{BUILTIN}/{name}", status.st_size, status.st_mtime_ns)
    for name, text in sorted(_documents().items()):
        yield SourceFile(name, name, len(text))


def read(path: str) -> bytes:
    """The text of a document "builtin:python/..." that is no file."""
    return _documents()[path]


def _python_files(root: str) -> Iterator[str]:
    for parent, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _FOLDERS and not name.startswith(_PREFIXES)
        ]
        for name in names:
            relative = os.path.relpath(os.path.join(parent, name), root)
            if name.endswith(".py") and not name.startswith(_PREFIXES) and relative not in _FILES:
                yield relative


@functools.cache
def _documents() -> dict[str, bytes]:
    texts = {f"{BUILTIN}/topics/{name}": text for name, text in _topics().items()}
    for name in sys.builtin_module_names:
        text = _docstrings(name)
        if text:
            texts[f"{BUILTIN}/doc/{name}"] = text
    return {name: text.encode("utf-8") for name, text in texts.items() if text.strip()}


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return dict(topics)


def _docstrings(module_name: str) -> str:
    """Docstrings of a compiled module, its functions, classes and methods. Text only: no repr,
    hence no address.
    """
    if module_name in ("__main__", "sys"):  # its hooks are there to be replaced
        return ""
    module = importlib.import_module(module_name)
    entries = [(module_name, module.__doc__)]
    for name, value in sorted(vars(module).items()):
        # Only what is compiled in: `site` and others hang more names into `builtins`, or replace
        # `__import__`.
        if name.startswith("__"):
            continue
        if inspect.isbuiltin(value):
            entries.append((f"{module_name}.{name}", value.__doc__))
        elif isinstance(value, type) and value.__module__ == module_name:
            entries.append((f"{module_name}.{name}", value.__doc__))
            members = {key: item for key, item in vars(value).items() if not key.startswith("_")}
            entries += [
                (f"{module_name}.{name}.{key}", members[key].__doc__) for key in sorted(members)
            ]
    return "\n\n".join(
        f"{name}\n{doc}" for name, doc in entries if isinstance(doc, str) and doc.strip()
    )
