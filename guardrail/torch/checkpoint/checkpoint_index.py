"""Which checkpoints are on the disk, and the state of each; and the events about them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.records.record import Record
from guardrail.core.records.status import SnapshotInfo
from guardrail.rundir.manifest import Manifest, read_manifest
from guardrail.torch.checkpoint.snapshot_states import CANDIDATE, GOOD, INVALID, SUSPECT


class CheckpointEvent(Record, frozen=True, kw_only=True):
    """What happened to a checkpoint, for the journal.

    Attributes:
        state: "candidate" or "suspect" (committed), "failed", "pruned", "invalid".
        name: of the folder; "" if there is none.
        reason: why it failed; of a candidate, a warning about it.
        seconds: from the call of `save` to the commit.
    """

    state: str
    step: int
    timeline: int = 0
    name: str = ""
    bytes: int = 0
    reason: str = ""
    seconds: float = 0.0


def build_event(
    state: str, info: SnapshotInfo, reason: str = "", *, seconds: float = 0.0
) -> CheckpointEvent:
    """Return an event about the checkpoint of `info`."""
    return CheckpointEvent(
        state=state,
        step=info.step,
        timeline=info.timeline,
        name=info.path,
        bytes=info.bytes,
        reason=reason,
        seconds=seconds,
    )


def info_from_manifest(name: str, manifest: Manifest) -> SnapshotInfo:
    """Return the record of a checkpoint that was committed."""
    return SnapshotInfo(
        step=manifest.step,
        cursor=manifest.cursor,
        timeline=manifest.timeline,
        tier="disk",
        state=SUSPECT if manifest.suspect else CANDIDATE,
        time=manifest.time,
        bytes=manifest.bytes,
        path=name,
    )


def info_from_folder(path: Path) -> SnapshotInfo:
    """Return the record of a checkpoint folder; it is invalid without a valid manifest."""
    try:
        return info_from_manifest(path.name, read_manifest(path))
    except CheckpointInvalid:
        step = int(path.name.removeprefix("step-").split("-")[0])
        return SnapshotInfo(
            step=step, cursor=0, timeline=0, tier="disk", state=INVALID, path=path.name
        )


class CheckpointIndex:
    """The checkpoints on disk by folder name. All methods may be called on any thread.

    Args:
        folder: `checkpoints/` of the run directory.
        infos: those that are there; none on other ranks than 0.
    """

    def __init__(self, folder: Path, infos: Mapping[str, SnapshotInfo]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._infos = dict(infos)

    def infos(self) -> list[SnapshotInfo]:
        """Return the records, oldest first; `path` is the folder's name."""
        with self._lock:
            infos = list(self._infos.values())
        return sorted(infos, key=lambda info: (info.timeline, info.step, info.path))

    def add(self, infos: Iterable[SnapshotInfo]) -> None:
        """Add records; one of the same name is replaced."""
        with self._lock:
            for info in infos:
                self._infos[info.path] = info

    def remove(self, infos: Iterable[SnapshotInfo]) -> None:
        """Remove records."""
        with self._lock:
            for info in infos:
                del self._infos[info.path]

    def add_if_on_disk(self, info: SnapshotInfo) -> None:
        """Add a record again if its folder still exists."""
        with self._lock, contextlib.suppress(OSError):
            if (self._folder / info.path).exists():
                self._infos[info.path] = info

    def forget_foreign(self, why_foreign: Callable[[Manifest], str]) -> dict[str, str]:
        """Remove the records of checkpoints of another run; their folders stay.

        Args:
            why_foreign: the reason by the manifest; "" for a checkpoint of this run.

        Returns:
            Name -> reason.
        """
        reasons: dict[str, str] = {}
        for info in self.infos():
            with contextlib.suppress(CheckpointInvalid):
                reason = why_foreign(read_manifest(self._folder / info.path))
                if reason:
                    reasons[info.path] = reason
        with self._lock:
            for name in reasons:
                del self._infos[name]
        return reasons

    def set_states(self, states: Mapping[str, str]) -> list[SnapshotInfo]:
        """Set states by folder name; return the new records. Missing and invalid ones stay."""
        changed: list[SnapshotInfo] = []
        with self._lock:
            for name, state in states.items():
                if name in self._infos and self._infos[name].state != INVALID:
                    changed.append(self._set_state(name, state))
        return changed

    def mark_invalid(self, names: Iterable[str]) -> list[SnapshotInfo]:
        """Set the state of those that are there to invalid; return the new records."""
        with self._lock:
            return [self._set_state(name, INVALID) for name in names if name in self._infos]

    def confirm(self, is_good: Callable[[int], bool]) -> list[SnapshotInfo]:
        """Make every candidate good whose step `is_good`; return the new records."""
        return self._change_state({CANDIDATE}, GOOD, is_good)

    def withdraw_good(self, from_step: int) -> list[SnapshotInfo]:
        """Make good ones of `from_step` and later candidates again; return the new records."""
        return self._change_state({GOOD}, CANDIDATE, lambda step: step >= from_step)

    def mark_suspect(self, from_step: int) -> list[SnapshotInfo]:
        """Make good ones and candidates from a step on suspect; return the new records."""
        return self._change_state({CANDIDATE, GOOD}, SUSPECT, lambda step: step >= from_step)

    def _change_state(
        self, before: set[str], after: str, fits: Callable[[int], bool]
    ) -> list[SnapshotInfo]:
        with self._lock:
            names = [
                name
                for name, info in self._infos.items()
                if info.state in before and fits(info.step)
            ]
            return [self._set_state(name, after) for name in names]

    def _set_state(self, name: str, state: str) -> SnapshotInfo:
        self._infos[name] = msgspec.structs.replace(self._infos[name], state=state)
        return self._infos[name]
