"""Facts that must be equal on all ranks, and an error that names the rank that differs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guardrail.core.errors import UsageError
from guardrail.core.text import clean_text


def require_equal(facts: Mapping[str, Any], gather: Callable[[Any], Sequence[Any]]) -> None:
    """Compare facts over the ranks. A collective: all ranks continue or all raise.

    Args:
        facts: name -> value that can be compared and printed, such as a fingerprint.
        gather: returns every rank's value, by rank; a collective.

    Raises:
        UsageError: names the fact, and a rank and its host with each of two values.
    """
    by_rank = gather((socket.gethostname(), dict(facts)))
    first_host, first = by_rank[0]
    for rank, (host, theirs) in enumerate(by_rank):
        for name in first:
            if theirs.get(name) != first[name]:
                raise UsageError(
                    f"{name} is {first[name]} on rank 0 ({clean_text(first_host, 80)}) and "
                    f"{theirs.get(name)} on rank {rank} ({clean_text(host, 80)}): "
                    "all ranks must train on the same data in the same order. "
                    "Give every node the same files and the same configuration."
                )


class _RunFolder(NamedTuple):
    """The run directory of one rank.

    Attributes:
        path: without symbolic links; "" without a run directory.
        device, inode: number of the file system on its host, and of the folder in it; None:
            unknown.
    """

    host: str
    path: str
    device: int | None
    inode: int | None

    def is_same(self, other: _RunFolder) -> bool:
        """Return whether both name one folder. Hosts may mount a shared disk at different paths."""
        if self.path == other.path:
            return True
        if self.host == other.host and self.device != other.device:
            return False  # two file systems number their folders alike
        return self.inode is not None and self.inode == other.inode


def require_same_run(path: Path | None, gather: Callable[[Any], Sequence[Any]]) -> None:
    """Check that all ranks have the same run directory. A collective.

    Ranks with different directories would wait for each other's part of a checkpoint.

    Args:
        path: this rank's run directory; None: it has none.
        gather: returns every rank's value, by rank; a collective.

    Raises:
        UsageError: names a rank with each of two directories; raised on every rank.
    """
    by_rank = [_RunFolder(*found) for found in gather(tuple(_find_folder(path)))]
    first = by_rank[0]
    for rank, other in enumerate(by_rank):
        if not first.is_same(other):
            raise UsageError(
                f"run is {_describe_folder(first)} on rank 0 and {_describe_folder(other)} on rank "
                f"{rank}: all ranks must have the same run directory\n"
                "  hint: create it on rank 0 and broadcast its path; on the other ranks use "
                "RunDirectory.open(path)",
                kind="different_runs",
            )


def _find_folder(path: Path | None) -> _RunFolder:
    host = socket.gethostname()
    if path is None:
        return _RunFolder(host, "", None, None)
    resolved = os.path.realpath(path)
    try:
        found = os.stat(resolved)
    except OSError:
        return _RunFolder(host, resolved, None, None)
    return _RunFolder(host, resolved, found.st_dev, found.st_ino)


def _describe_folder(folder: _RunFolder) -> str:
    path = "None"
    if folder.path:
        path = clean_text(folder.path)
    return f"{path} ({clean_text(folder.host, 80)})"
