"""The tier on disk: saves in the background, states and retention, verified loads.

A failed save never stops training: it becomes an event, and `retry_due` says when to try again.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.files import FOLDER_MODE, TEMPORARY
from guardrail.core.records import Record, SnapshotInfo
from guardrail.rundir.manifest import (
    OPTIM,
    Manifest,
    Progress,
    checkpoint_dirs,
    read_manifest,
    verify,
)
from guardrail.torch.checkpoint.commit import (
    Job,
    SaveFailed,
    collect,
    commit,
    reason_of,
    remove,
    sweep,
    withdraw,
    write_share,
)
from guardrail.torch.checkpoint.loader import Allowed, CheckpointLoader, Loaded, Selection
from guardrail.torch.checkpoint.memory_snapshots import CANDIDATE, GOOD, SUSPECT, Snapshot
from guardrail.torch.checkpoint.retention import superfluous
from guardrail.torch.checkpoint.writer_thread import Background
from guardrail.torch.state.training_state import TrainingState

INVALID, FOREIGN = "invalid", "foreign"


class CheckpointEvent(Record, frozen=True, kw_only=True):
    """What has happened to a checkpoint, for the journal.

    Attributes:
        state: "candidate" or "suspect" (committed), "failed", "pruned", "invalid".
        name: of the folder; "" where there is none.
        reason: why it failed; of a candidate, what was odd about it.
        seconds: from the call of `save` to the commit.
    """

    state: str
    step: int
    timeline: int = 0
    name: str = ""
    bytes: int = 0
    reason: str = ""
    seconds: float = 0.0


@dataclass(kw_only=True)
class _Save:
    job: Job
    asked: float
    superseded: bool = False
    # of an unresolved incident: known when it was asked for, or found out before its commit
    suspect: bool = False


class CheckpointStore:
    """The checkpoints of one run. Constructed, and `newest_valid` and `load` called, on every rank
    at once.

    Only rank 0 commits, prunes and knows what is on the disk; `poll` and `retry_due` of another
    rank tell of its own failures, which rank 0 hears of too.

    Args:
        folder: `checkpoints/` of the run directory; created.
        state: what is saved and loaded.
        rank, world: of the default process group.
        keep: good checkpoints kept, at least 2.
        delay_steps: longest time between the onset of trouble and its detection; one checkpoint
        older than that stays.
        retry_seconds: from a failure to `retry_due`.
        commit_seconds: how long rank 0 waits for the shares of the others.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainingState,
        *,
        rank: int = 0,
        world: int = 1,
        keep: int = 3,
        delay_steps: int = 0,
        retry_seconds: float = 30.0,
        commit_seconds: float = 600.0,
    ) -> None:
        if keep < 2:
            raise ValueError(
                "keep must be at least 2: the last good checkpoint outlives the writing of the next"
            )
        self.folder, self.state, self.rank, self.world = folder, state, rank, world
        self.keep, self.delay_steps = keep, delay_steps
        self.retry_seconds, self.commit_seconds = retry_seconds, commit_seconds
        self._loader = CheckpointLoader(folder, state, rank=rank, world=world)
        self._background = Background("guardrail-checkpoints")
        self._lock = threading.Lock()  # for what follows: the background thread changes it too
        self._events: list[CheckpointEvent] = []
        self._waiting: _Save | None = None
        self._writing: _Save | None = None
        self._failure = (0, "")  # serial of this rank's last save that failed, and why
        # by rank: the serial of its last save that failed
        self._failed_elsewhere: tuple[int, ...] = ()
        self._failed_at: float | None = None
        self._serial = 0
        if rank == 0:  # before the others learn the name below, which they take as leave to write
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        # What makes the names of this start's temporary folders its own, on every rank.
        self._temporary = f"{TEMPORARY}{self._loader.gathered(secrets.token_hex(4))[0]}-"
        self._infos = self._loader.slow_work(self._look_around if rank == 0 else dict)

    def _look_around(self) -> dict[str, SnapshotInfo]:
        """Remove what dead writers have left, and see which checkpoints there are."""
        sweep(self.folder, spare=lambda name: name.startswith(self._temporary))
        return {path.name: _info_on_disk(path) for path in checkpoint_dirs(self.folder)}

    # -- saving ------------------------------------------------------------------------------------

    def save(
        self,
        snapshot: Snapshot,
        identity: Mapping[str, Any] | None = None,
        *,
        suspect: bool = False,
    ) -> None:
        """Ask for a checkpoint of the snapshot, on every rank at the same step; returns at once.

        The snapshot's buffers are pinned until it is written. At most one save waits behind the one
        that is being written: a newer one takes its place, and the older one fails as superseded.

        Args:
            identity: JSON-able facts for the manifest: fingerprints of configuration and data,
            versions.
            suspect: it holds steps of an unresolved incident; says so from its commit on.

        Raises:
            ValueError: the snapshot has left the ring, and its buffers may hold a later step.
        """
        if not snapshot.buffers:
            raise ValueError(f"the snapshot of step {snapshot.step} has left the ring")
        moments = any(name.startswith(OPTIM) for name in snapshot.layout.names)
        self._serial += 1
        job = Job(
            folder=self.folder / f"{self._temporary}{self._serial:06d}-step-{snapshot.step:08d}",
            snapshot=snapshot,
            rank=self.rank,
            world=self.world,
            strategy=self._loader.strategy,
            like=self.state.holders[0] if self.state.holders is not None else 0,
            identity=dict(identity or {}),
            stateless=snapshot.step > 0 and not moments and self.state.stateless() is not False,
            serial=self._serial,
        )
        snapshot.pin()
        save = _Save(job=job, asked=time.monotonic(), suspect=suspect)
        with self._lock:
            self._failed_at = None
            if self._waiting is not None:
                self._waiting.superseded = True
                self._waiting.job.snapshot.release()
            self._waiting = save
        self._background.submit(lambda: self._perform(save))

    @property
    def busy(self) -> bool:
        """Whether this rank has something left to write or to delete."""
        return self._background.busy

    @property
    def degraded(self) -> bool:
        """The last save that came to an end has failed."""
        with self._lock:
            return self._failed_at is not None

    @property
    def retry_due(self) -> bool:
        """The last save failed `retry_seconds` ago, and none has been asked for since."""
        with self._lock:
            return (
                self._failed_at is not None
                and time.monotonic() >= self._failed_at + self.retry_seconds
            )

    @property
    def failure(self) -> tuple[int, str]:
        """The number of this rank's last save that failed, counting from 1 as on every rank, and
        why; (0, ""): none.
        """
        with self._lock:
            return self._failure

    def note_failures(self, serials: Sequence[int]) -> None:
        """On rank 0: what `failure` says on each rank, by rank. A disk that is broken there cannot
        say so itself.
        """
        with self._lock:
            self._failed_elsewhere = tuple(serials)

    def _failed_ranks(self, serial: int) -> list[int]:
        """Ranks whose share of this save will not come."""
        with self._lock:
            return [rank for rank, failed in enumerate(self._failed_elsewhere) if failed >= serial]

    def wait(self, seconds: float) -> bool:
        """Until all that was asked for is done on this rank; False when `seconds` were not
        enough.
        """
        return self._background.wait(seconds)

    def poll(self) -> list[CheckpointEvent]:
        """What has happened since the last call. Never waits for the disk."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def close(self, seconds: float = 0.0) -> bool:
        """Finish what was asked for, within `seconds`, and end the thread. Harmless when called
        again.
        """
        done = self._background.close(seconds)
        if done and self.rank == 0:  # what other ranks wrote after rank 0 had given a save up
            sweep(self.folder, spare=lambda name: not name.startswith(self._temporary))
        return done

    def _perform(self, save: _Save) -> None:
        with self._lock:
            if self._waiting is save:
                self._waiting = None
            self._writing = save
        snapshot, event = save.job.snapshot, None
        try:
            if save.superseded:
                raise SaveFailed("superseded by a later save before its turn came")
            event = self._saved(save)
        except BaseException as error:
            # Everything: SafetensorError, RuntimeError without errno, MemoryError, DCP's
            # CheckpointException, which derives from BaseException. This thread has no caller to
            # raise to, and the next save needs it.
            event = self._failed(save, reason_of(error))
        finally:
            if not save.superseded:
                snapshot.release()
            with self._lock:
                self._writing = None
                self._events += [event] if event is not None else []

    def _saved(self, save: _Save) -> CheckpointEvent | None:
        job = save.job
        if self.rank == 0:
            sweep(self.folder, spare=lambda name: name >= job.folder.name)
        own = write_share(job)
        if self.rank != 0:
            return None
        given_up: Callable[[], bool] = lambda: self._background.closing  # noqa: E731
        failed = lambda: self._failed_ranks(job.serial)  # noqa: E731
        reports = collect(job, own, seconds=self.commit_seconds, given_up=given_up, failed=failed)
        path, manifest = commit(job, reports, lambda: save.suspect)
        info = _info(path.name, manifest)
        with self._lock:
            self._failed_at = None
            self._infos[path.name] = info
        return _event(info.state, info, manifest.warning, seconds=time.monotonic() - save.asked)

    def _failed(self, save: _Save, reason: str) -> CheckpointEvent:
        withdraw(save.job, reason)
        with self._lock:
            self._failure = save.job.serial, reason
            if not save.superseded:  # that one has its retry already
                self._failed_at = time.monotonic()
        seconds = time.monotonic() - save.asked
        info = msgspec.structs.replace(save.job.snapshot.info(), path="")
        return _event("failed", info, reason, seconds=seconds)

    # -- states and retention, rank 0 --------------------------------------------------------------

    def infos(self) -> list[SnapshotInfo]:
        """The checkpoints on disk, oldest first; `path` is the folder's name. Empty on other
        ranks.
        """
        with self._lock:
            return sorted(
                self._infos.values(), key=lambda info: (info.timeline, info.step, info.path)
            )

    def disown(self, why: Callable[[Manifest], str]) -> dict[str, str]:
        """On rank 0: forget the checkpoints of another run, which stay where they are. Returns name
        -> reason.

        Args:
            why: the reason by the manifest; "" for one of this run.
        """
        reasons: dict[str, str] = {}
        for info in self.infos():
            with contextlib.suppress(CheckpointInvalid):
                if reason := why(read_manifest(self.folder / info.path)):
                    reasons[info.path] = reason
        with self._lock:
            for name in reasons:
                del self._infos[name]
        return reasons

    def adopt(self, states: Mapping[str, str]) -> list[SnapshotInfo]:
        """Set states by folder name, of those that are there and valid; returns these. Others stay
        as they are.
        """
        with self._lock:
            there = [
                name
                for name in states
                if name in self._infos and self._infos[name].state != INVALID
            ]
            return [self._set(name, states[name]) for name in there]

    def confirm(self, is_good: Callable[[int], bool]) -> list[SnapshotInfo]:
        """Call good every candidate whose step `is_good` (see `Controller.is_good`); returns
        these.
        """
        return self._move({CANDIDATE}, GOOD, lambda info: is_good(info.step))

    def withdraw(self, from_step: int) -> list[SnapshotInfo]:
        """Good ones of `from_step` and later are candidates again: an incident that is not over
        holds them.
        """
        return self._move({GOOD}, CANDIDATE, lambda info: info.step >= from_step)

    def mark_suspect(self, from_step: int) -> list[SnapshotInfo]:
        """Checkpoints of `from_step` and later must not be used again; returns the newly marked.

        `from_step` is the first step of the trouble or, where the run goes back further, the first
        one that is done again: of two checkpoints of the same step only that of the present
        timeline may count. One that is still being written is committed as suspect.
        """
        with self._lock:
            for save in (self._writing, self._waiting):
                if save is not None and save.job.snapshot.step >= from_step:
                    save.suspect = True
        return self._move({CANDIDATE, GOOD}, SUSPECT, lambda info: info.step >= from_step)

    def _move(
        self, before: set[str], after: str, fits: Callable[[SnapshotInfo], bool]
    ) -> list[SnapshotInfo]:
        with self._lock:
            names = [
                name for name, info in self._infos.items() if info.state in before and fits(info)
            ]
            return [self._set(name, after) for name in names]

    def _set(self, name: str, state: str) -> SnapshotInfo:
        self._infos[name] = msgspec.structs.replace(self._infos[name], state=state)
        return self._infos[name]

    def prune(self, now: int, *, since: int | None = None) -> None:
        """Delete in the background what retention does not keep; `pruned` events follow.

        There too the good ones that stay are looked at before (manifest, sizes): a damaged one
        takes no other's place.

        Args:
            since: the first step of an incident that is not over; see `superfluous`.
        """
        going = superfluous(
            self.infos(), keep=self.keep, now=now, delay=self.delay_steps, since=since
        )
        if not going:
            return
        staying = [info for info in self.infos() if info.state == GOOD and info not in going]
        with self._lock:
            for info in going:
                del self._infos[info.path]
        self._background.submit(lambda: self._prune(going, staying, now, since))

    def _prune(
        self, going: list[SnapshotInfo], staying: list[SnapshotInfo], now: int, since: int | None
    ) -> None:
        """On the background thread: delete `going` if all of `staying` hold, else choose again
        without the damaged.
        """
        broken = {
            info.path: why for info in staying if (why := _what_is_broken(self.folder / info.path))
        }
        if not broken:
            self._remove(going)
            return
        with self._lock:
            self._infos |= {info.path: info for info in going}
            for name, reason in broken.items():
                if name in self._infos:
                    self._events.append(_event(INVALID, self._set(name, INVALID), reason))
        self.prune(now, since=since)

    def _remove(self, going: list[SnapshotInfo]) -> None:
        for info in going:
            path = self.folder / info.path
            try:
                remove(path, aside=self.folder / f"{self._temporary}gone-{info.path}")
                event = _event("pruned", info)
            except OSError as error:
                event = _event("failed", info, f"could not be deleted: {reason_of(error)}")
            with self._lock:
                self._events.append(event)
                with contextlib.suppress(OSError):
                    if path.exists():
                        self._infos[info.path] = info

    # -- loading, on every rank at once ------------------------------------------------------------

    def newest_valid(
        self, allowed: Allowed = lambda manifest: True, progress: Progress | None = None
    ) -> Selection:
        """See `CheckpointLoader.newest_valid`. Those that do not hold are invalid from now on."""
        selection = self._loader.newest_valid(allowed, progress)
        with self._lock:
            for name in selection.invalid & set(self._infos):
                self._set(name, INVALID)
        return selection

    def load(self, path: Path, *, weights_only: bool = False) -> Loaded:
        """See `CheckpointLoader.load`."""
        return self._loader.load(path, weights_only=weights_only)


def _event(
    state: str, info: SnapshotInfo, reason: str = "", *, seconds: float = 0.0
) -> CheckpointEvent:
    return CheckpointEvent(
        state=state,
        step=info.step,
        timeline=info.timeline,
        name=info.path,
        bytes=info.bytes,
        reason=reason,
        seconds=seconds,
    )


def _info(name: str, manifest: Manifest) -> SnapshotInfo:
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


def _info_on_disk(path: Path) -> SnapshotInfo:
    try:
        return _info(path.name, read_manifest(path))
    except CheckpointInvalid:
        step = int(path.name.removeprefix("step-").split("-")[0])
        return SnapshotInfo(
            step=step, cursor=0, timeline=0, tier="disk", state=INVALID, path=path.name
        )


def _what_is_broken(path: Path) -> str:
    try:
        verify(path, files=())
    except CheckpointInvalid as error:
        return str(error)
    return ""
