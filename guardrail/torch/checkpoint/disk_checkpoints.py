"""The checkpoints of a run on disk: background saves, states and retention, verified loads.

A failed save never stops training. It becomes an event, and `retry_due` is true when it is time to
try again.
"""

from __future__ import annotations

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
from guardrail.core.records.status import SnapshotInfo
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import OPTIM, Manifest
from guardrail.rundir.verification import Progress, verify
from guardrail.torch.checkpoint.checkpoint_index import (
    CheckpointEvent,
    CheckpointIndex,
    build_event,
    info_from_folder,
    info_from_manifest,
)
from guardrail.torch.checkpoint.commit import (
    collect_reports,
    commit,
    remove_checkpoint,
    remove_temporary,
)
from guardrail.torch.checkpoint.loader import Allowed, CheckpointLoader, Loaded, Selection
from guardrail.torch.checkpoint.memory_snapshots import Snapshot
from guardrail.torch.checkpoint.rank_share import report_failure, write_share
from guardrail.torch.checkpoint.retention import find_superfluous
from guardrail.torch.checkpoint.save_job import SaveFailed, SaveJob, reason_of
from guardrail.torch.checkpoint.snapshot_states import GOOD
from guardrail.torch.checkpoint.writer_thread import WriterThread
from guardrail.torch.state.training_state import TrainingState


@dataclass(kw_only=True)
class _Save:
    job: SaveJob
    requested_at: float
    superseded: bool = False
    # Of an unresolved incident: known at the request, or detected before the commit.
    suspect: bool = False


class CheckpointStore:
    """The checkpoints of one run. Every rank constructs it, and calls `find_newest_valid` and
    `load`, at the same time.

    Only rank 0 commits, deletes, and knows what is on the disk. `take_events` and `retry_due` of
    another rank report its own failures, which rank 0 receives too.

    Args:
        folder: `checkpoints/` of the run directory; created.
        state: what is saved and loaded.
        rank, world: of the default process group.
        keep: good checkpoints kept, at least 2.
        delay_steps: longest time between the onset of an anomaly and its detection; one checkpoint
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
                "keep must be at least 2: the last good checkpoint stays until the next is written"
            )
        self.folder, self.state, self.rank, self.world = folder, state, rank, world
        self.keep, self.delay_steps = keep, delay_steps
        self.retry_seconds, self.commit_seconds = retry_seconds, commit_seconds
        self._loader = CheckpointLoader(folder, state, rank=rank, world=world)
        self._writer = WriterThread("guardrail-checkpoints")
        self._lock = threading.Lock()  # for the fields below, which the writer thread changes too
        self._events: list[CheckpointEvent] = []
        self._waiting: _Save | None = None
        self._writing: _Save | None = None
        self._failure = (0, "")  # serial of this rank's last save that failed, and why
        # By rank: the serial of its last save that failed.
        self._failed_elsewhere: tuple[int, ...] = ()
        self._failed_at: float | None = None
        self._serial = 0
        if rank == 0:  # before the others receive the name below, after which they write
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        # The random part distinguishes the temporary folders of this start, on every rank.
        self._temporary = f"{TEMPORARY}{self._loader.gather(secrets.token_hex(4))[0]}-"
        self._index = CheckpointIndex(
            folder, self._loader.run_slow_work(self._read_folder if rank == 0 else dict)
        )

    def _read_folder(self) -> dict[str, SnapshotInfo]:
        """Remove what dead writers have left; return the checkpoints by folder name."""
        remove_temporary(self.folder, spare=lambda name: name.startswith(self._temporary))
        return {path.name: info_from_folder(path) for path in checkpoint_dirs(self.folder)}

    # -- saving ------------------------------------------------------------------------------------

    def save(
        self,
        snapshot: Snapshot,
        identity: Mapping[str, Any] | None = None,
        *,
        suspect: bool = False,
    ) -> None:
        """Request a checkpoint of the snapshot, on every rank at the same step; return at once.

        The snapshot's buffers are pinned until it is written. At most one save waits while another
        is written. A newer one replaces it, and the older one fails as superseded.

        Args:
            identity: JSON-able facts for the manifest: fingerprints of configuration and data,
                versions.
            suspect: it holds steps of an unresolved incident, and is committed as suspect.

        Raises:
            ValueError: the snapshot has left the ring, so its buffers may hold a later step.
        """
        if not snapshot.buffers:
            raise ValueError(f"the snapshot of step {snapshot.step} has left the ring")
        self._serial += 1
        save = _Save(
            job=self._build_job(snapshot, identity), requested_at=time.monotonic(), suspect=suspect
        )
        snapshot.pin()
        with self._lock:
            self._failed_at = None
            if self._waiting is not None:
                self._waiting.superseded = True
                self._waiting.job.snapshot.release()
            self._waiting = save
        self._writer.submit(lambda: self._perform(save))

    def _build_job(self, snapshot: Snapshot, identity: Mapping[str, Any] | None) -> SaveJob:
        has_moments = any(name.startswith(OPTIM) for name in snapshot.layout.names)
        like = 0
        if self.state.holders is not None:
            like = self.state.holders[0]
        return SaveJob(
            folder=self.folder / f"{self._temporary}{self._serial:06d}-step-{snapshot.step:08d}",
            snapshot=snapshot,
            rank=self.rank,
            world=self.world,
            strategy=self._loader.strategy,
            like=like,
            identity=dict(identity or {}),
            stateless=(
                snapshot.step > 0 and not has_moments and self.state.stateless() is not False
            ),
            serial=self._serial,
        )

    @property
    def busy(self) -> bool:
        """Whether this rank has something left to write or to delete."""
        return self._writer.busy

    @property
    def degraded(self) -> bool:
        """Whether the last save that ended has failed."""
        with self._lock:
            return self._failed_at is not None

    @property
    def retry_due(self) -> bool:
        """Whether the last save failed `retry_seconds` ago, and none was requested since."""
        with self._lock:
            failed_at = self._failed_at
        return failed_at is not None and time.monotonic() >= failed_at + self.retry_seconds

    @property
    def failure(self) -> tuple[int, str]:
        """Number of this rank's last save that failed, and why; (0, ""): none failed.

        Saves are counted from 1, the same on every rank.
        """
        with self._lock:
            return self._failure

    def note_failures(self, serials: Sequence[int]) -> None:
        """Store the number in `failure` of each rank, by rank; on rank 0.

        A rank whose disk is broken cannot report that by a file.
        """
        with self._lock:
            self._failed_elsewhere = tuple(serials)

    def _failed_ranks(self, serial: int) -> list[int]:
        """Return the ranks whose share of this save will not come."""
        with self._lock:
            return [rank for rank, failed in enumerate(self._failed_elsewhere) if failed >= serial]

    def wait(self, seconds: float) -> bool:
        """Wait until all requests are done on this rank; return False after `seconds`."""
        return self._writer.wait(seconds)

    def take_events(self) -> list[CheckpointEvent]:
        """Return what has happened since the last call. Never waits for the disk."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def close(self, seconds: float = 0.0) -> bool:
        """Finish what was requested, within `seconds`, and end the thread. May be called again."""
        done = self._writer.close(seconds)
        if done and self.rank == 0:
            # Other ranks may have written after rank 0 had aborted a save.
            remove_temporary(self.folder, spare=lambda name: not name.startswith(self._temporary))
        return done

    def _perform(self, save: _Save) -> None:
        with self._lock:
            if self._waiting is save:
                self._waiting = None
            self._writing = save
        event: CheckpointEvent | None = None
        try:
            if save.superseded:
                raise SaveFailed("superseded by a later save before it began")
            event = self._write(save)
        except BaseException as error:
            # Any error: SafetensorError, RuntimeError without errno, MemoryError, and DCP's
            # CheckpointException, which derives from BaseException. This thread has no caller to
            # raise to, and the next save needs the thread.
            event = self._fail(save, reason_of(error))
        finally:
            if not save.superseded:
                save.job.snapshot.release()
            with self._lock:
                self._writing = None
                if event is not None:
                    self._events.append(event)

    def _write(self, save: _Save) -> CheckpointEvent | None:
        job = save.job
        if self.rank == 0:
            remove_temporary(self.folder, spare=lambda name: name >= job.folder.name)
        own = write_share(job)
        if self.rank != 0:
            return None
        reports = collect_reports(
            job,
            own,
            seconds=self.commit_seconds,
            is_aborted=lambda: self._writer.closing,
            failed=lambda: self._failed_ranks(job.serial),
        )
        path, manifest = commit(job, reports, lambda: save.suspect)
        info = info_from_manifest(path.name, manifest)
        with self._lock:
            self._failed_at = None
            self._index.add([info])
        seconds = time.monotonic() - save.requested_at
        return build_event(info.state, info, manifest.warning, seconds=seconds)

    def _fail(self, save: _Save, reason: str) -> CheckpointEvent:
        report_failure(save.job, reason)
        with self._lock:
            self._failure = save.job.serial, reason
            if not save.superseded:  # the save that replaced it is its retry
                self._failed_at = time.monotonic()
        seconds = time.monotonic() - save.requested_at
        info = msgspec.structs.replace(save.job.snapshot.info(), path="")
        return build_event("failed", info, reason, seconds=seconds)

    # -- states and retention, rank 0 --------------------------------------------------------------

    def infos(self) -> list[SnapshotInfo]:
        """Return the checkpoints on disk, oldest first; empty on other ranks than 0."""
        return self._index.infos()

    def forget_foreign(self, why_foreign: Callable[[Manifest], str]) -> dict[str, str]:
        """Forget the checkpoints of another run, on rank 0; see `CheckpointIndex`."""
        return self._index.forget_foreign(why_foreign)

    def set_states(self, states: Mapping[str, str]) -> list[SnapshotInfo]:
        """Set states by folder name, except of missing and invalid ones; return the new records."""
        return self._index.set_states(states)

    def confirm(self, is_good: Callable[[int], bool]) -> list[SnapshotInfo]:
        """Make every candidate good whose step `is_good` (see `Controller.is_good`).

        Returns:
            The checkpoints that became good.
        """
        return self._index.confirm(is_good)

    def withdraw_good(self, from_step: int) -> list[SnapshotInfo]:
        """Make good ones of `from_step` and later candidates again; return these.

        They hold steps of an incident that is not over.
        """
        return self._index.withdraw_good(from_step)

    def mark_suspect(self, from_step: int) -> list[SnapshotInfo]:
        """Mark the checkpoints of `from_step` and later, which must not be used again.

        `from_step` is the first step of the incident. If the run goes back further, it is the first
        step that is done again: of two checkpoints of the same step, only that of the present
        timeline may count. One that is still being written is committed as suspect.

        Returns:
            The newly marked ones.
        """
        with self._lock:
            for save in (self._writing, self._waiting):
                if save is not None and save.job.snapshot.step >= from_step:
                    save.suspect = True
        return self._index.mark_suspect(from_step)

    def prune(self, now: int, *, since: int | None = None) -> None:
        """Delete in the background what retention does not keep; `pruned` events follow.

        The writer thread first checks the good ones that stay (manifest, sizes): a damaged one
        takes the place of no other.

        Args:
            since: first step of an incident that is not over; see `find_superfluous`.
        """
        going = find_superfluous(
            self.infos(), keep=self.keep, now=now, delay=self.delay_steps, since=since
        )
        if not going:
            return
        staying = [info for info in self.infos() if info.state == GOOD and info not in going]
        self._index.remove(going)
        self._writer.submit(lambda: self._delete_checked(going, staying, now, since))

    def _delete_checked(
        self, going: list[SnapshotInfo], staying: list[SnapshotInfo], now: int, since: int | None
    ) -> None:
        """Delete `going` if all of `staying` are valid; else choose again without the damaged."""
        problems = {info.path: _find_problem(self.folder / info.path) for info in staying}
        broken = {name: problem for name, problem in problems.items() if problem}
        if not broken:
            self._delete(going)
            return
        self._index.add(going)
        invalid = self._index.mark_invalid(broken)
        with self._lock:
            self._events += [build_event(info.state, info, broken[info.path]) for info in invalid]
        self.prune(now, since=since)

    def _delete(self, going: list[SnapshotInfo]) -> None:
        for info in going:
            path = self.folder / info.path
            try:
                remove_checkpoint(path, aside=self.folder / f"{self._temporary}gone-{info.path}")
                event = build_event("pruned", info)
            except OSError as error:
                event = build_event("failed", info, f"could not be deleted: {reason_of(error)}")
            with self._lock:
                self._events.append(event)
                self._index.add_if_on_disk(info)

    # -- loading, on every rank at once ------------------------------------------------------------

    def find_newest_valid(
        self, allowed: Allowed = lambda manifest: True, progress: Progress | None = None
    ) -> Selection:
        """Call `CheckpointLoader.find_newest_valid`; those that are damaged become invalid."""
        selection = self._loader.find_newest_valid(allowed, progress)
        self._index.mark_invalid(selection.invalid)
        return selection

    def load(self, path: Path, *, weights_only: bool = False) -> Loaded:
        """See `CheckpointLoader.load`."""
        return self._loader.load(path, weights_only=weights_only)


def _find_problem(path: Path) -> str:
    """Return what is damaged in a checkpoint; "" if it is valid. Does not read the tensors."""
    try:
        verify(path, files=())
    except CheckpointInvalid as error:
        return str(error)
    return ""
