"""What the ranks know of one save: the job, and the report that each rank writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardrail.core.errors import GuardrailError
from guardrail.core.records.record import Record
from guardrail.rundir.manifest import FileEntry
from guardrail.rundir.safetensors_header import Shape
from guardrail.torch.checkpoint.memory_snapshots import Snapshot


class SaveFailed(GuardrailError):
    """A checkpoint could not be written or committed; training continues."""


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """A save that was requested. Equal on every rank except for the snapshot's content.

    Attributes:
        folder: the temporary folder; its name is the same on all ranks, and of no other save.
        strategy, world, identity, stateless: as the manifest has them.
        like: the first rank that holds the same part of the model as this one.
        serial: number of the save, counted from 1 in this start.
    """

    folder: Path
    snapshot: Snapshot
    rank: int
    world: int
    strategy: str
    identity: dict[str, Any]
    stateless: bool
    like: int = 0
    serial: int = 0

    def data_path(self) -> Path:
        """Return the path of this rank's safetensors file."""
        return self.folder / f"rank-{self.rank:05d}.safetensors"

    def report_path(self, rank: int) -> Path:
        """Return the path of the report of a rank that has written its share."""
        return self.folder / f"rank-{rank:05d}.json"

    def failure_path(self, rank: int) -> Path:
        """Return the path of the file that a rank leaves when it could not write its share."""
        return self.folder / f"rank-{rank:05d}.failed"


class PartReport(Record, frozen=True, kw_only=True):
    """A piece of a tensor that a rank has written."""

    dtype: str
    shape: Shape
    offset: Shape
    size: Shape


class RankReport(Record, frozen=True, kw_only=True):
    """The content of rank-00000.json: what a rank has written.

    Attributes:
        names: hash of the names of its tensors, equal to that of rank `like`.
        extra: the guard's own state.
    """

    rank: int
    file: FileEntry
    parts: dict[str, PartReport]
    names: str
    digests: dict[str, str]
    extra: dict[str, Any]
    like: int = 0


def reason_of(error: BaseException) -> str:
    """Return one line for the journal about any exception."""
    if isinstance(error, OSError) and error.strerror:
        if not isinstance(error.filename, (str, bytes)):
            return error.strerror
        return f"{error.strerror} ({Path(os.fsdecode(error.filename)).name})"
    if isinstance(error, GuardrailError):
        return str(error)
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0]}"
