"""The tier on disk: saves by one background thread, verified loads, retention.

A failed save never stops training: it becomes an event, and `retry_due` says when to try again. A load checks every
hash before a live tensor is touched, and all ranks load the same checkpoint or none.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist
from torch import Tensor

from guardrail.errors import CheckpointInvalid
from guardrail.files import FOLDER_MODE, TEMPORARY
from guardrail.manifest import OPTIM, Box, Manifest, Progress, checkpoint_dirs, read_manifest, verify
from guardrail.records import Record, SnapshotInfo
from guardrail.torch import plain
from guardrail.torch.commit import Job, collect, commit, reason_of, remove, sweep, withdraw, write_share
from guardrail.torch.retention import superfluous
from guardrail.torch.shards import DTYPES, read_parts
from guardrail.torch.snapshots import CANDIDATE, GOOD, SUSPECT, Snapshot
from guardrail.torch.state import TrainingState, refuse

INVALID = "invalid"

Allowed = Callable[[Manifest], bool | str]


class CheckpointEvent(Record, frozen=True, kw_only=True):
    """What has happened to a checkpoint, for the journal.

    Attributes:
        state: "candidate" (committed), "failed", "pruned", "invalid".
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


class Selection(Record, frozen=True, kw_only=True):
    """The checkpoint that was found, and why each newer one was refused. `path` is None when there is none."""

    path: Path | None = None
    manifest: Manifest | None = None
    refused: tuple[tuple[Path, str], ...] = ()


class Loaded(Record, frozen=True, kw_only=True):
    """What a load has put into the live state.

    Attributes:
        extra: the guard's own state: this rank's, if as many ranks saved it, else rank 0's.
        checks: "ok", "differs on rank N" or "cold" for weights, moments, schedule, buffers: the live state after the
            load against what was saved. What cannot be compared (other sharding) is left out.
    """

    path: Path
    manifest: Manifest
    extra: dict[str, Any]
    checks: dict[str, str]


@dataclass(kw_only=True)
class _Task:
    """Work for the background thread: a save, or checkpoints to delete."""

    job: Job | None = None
    remove: list[SnapshotInfo] = field(default_factory=list)
    asked: float = 0.0
    superseded: bool = False


class CheckpointStore:
    """The checkpoints of one run. Constructed, and its collective methods called, on every rank at once.

    Only rank 0 commits, prunes and knows what is on the disk; `poll`, `infos` and `retry_due` of other ranks tell of
    their own failures at most.

    Args:
        folder: `checkpoints/` of the run directory; created.
        state: what is saved and loaded.
        rank, world: of the default process group.
        keep: good checkpoints kept, at least 2.
        delay_steps: longest time between the onset of trouble and its detection; one checkpoint older than that stays.
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
            raise ValueError("keep must be at least 2: the last good checkpoint outlives the writing of the next")
        self.folder, self.state, self.rank, self.world = folder, state, rank, world
        self.strategy = "fsdp" if state.sharded else "ddp"
        self.keep, self.delay_steps = keep, delay_steps
        self.retry_seconds, self.commit_seconds = retry_seconds, commit_seconds
        self._changed = threading.Condition()
        self._tasks: list[_Task] = []
        self._running: _Task | None = None
        self._events: list[CheckpointEvent] = []
        self._infos: dict[str, SnapshotInfo] = {}
        self._verified: Path | None = None
        self._failed_at: float | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._serial = 0
        self._nonce = self._agree_on_nonce()
        if rank == 0:
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            sweep(folder, spare=lambda name: name.startswith(f"{TEMPORARY}{self._nonce}-"))
            for path in checkpoint_dirs(folder):
                self._infos[path.name] = _info_on_disk(path)

    def _agree_on_nonce(self) -> str:
        """What makes the names of this start's temporary folders its own, on every rank."""
        return str(self._gathered(secrets.token_hex(4))[0])

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, identity: Mapping[str, Any] | None = None) -> None:
        """Ask for a checkpoint of the snapshot, on every rank at the same step; returns at once.

        The snapshot's buffers are pinned until it is written. At most one save waits behind the one that is being
        written: a newer one takes its place, and the older one fails as superseded.

        Args:
            identity: JSON-able facts for the manifest: fingerprints of configuration and data, versions.
        """
        moments = any(name.startswith(OPTIM) for name in snapshot.layout.names)
        self._serial += 1
        job = Job(
            folder=self.folder / f"{TEMPORARY}{self._nonce}-{self._serial:06d}-step-{snapshot.step:08d}",
            snapshot=snapshot,
            rank=self.rank,
            world=self.world,
            strategy=self.strategy,
            identity=dict(identity or {}),
            stateless=snapshot.step > 0 and not moments and self.state.stateless() is not False,
        )
        snapshot.pin()
        with self._changed:
            self._failed_at = None
            for task in self._tasks:
                if task.job is not None and not task.superseded:
                    task.superseded = True
                    task.job.snapshot.release()
            self._tasks.append(_Task(job=job, asked=time.monotonic()))
            self._changed.notify_all()
        self._ensure_thread()

    @property
    def busy(self) -> bool:
        """Whether this rank has something to write or to delete."""
        with self._changed:
            return bool(self._tasks) or self._running is not None

    @property
    def retry_due(self) -> bool:
        """Rank 0: the last save failed `retry_seconds` ago, and none has been asked for since."""
        with self._changed:
            return self._failed_at is not None and time.monotonic() >= self._failed_at + self.retry_seconds

    @property
    def degraded(self) -> bool:
        """Rank 0: the last save that ended has failed."""
        with self._changed:
            return self._failed_at is not None

    def wait(self, seconds: float) -> bool:
        """Until all that was asked for is done on this rank; False when `seconds` were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tasks and self._running is None, timeout=seconds)

    def poll(self) -> list[CheckpointEvent]:
        """What has happened since the last call. Never waits for the disk."""
        with self._changed:
            events, self._events = self._events, []
        return events

    def close(self, seconds: float = 0.0) -> bool:
        """Finish what was asked for, for `seconds` at most, and end the thread. Harmless when called again."""
        done = self.wait(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if done and self.rank == 0:  # what other ranks wrote after rank 0 had given a save up
            sweep(self.folder, spare=lambda name: not name.startswith(f"{TEMPORARY}{self._nonce}-"))
        return done

    # -- states and retention, rank 0 ----------------------------------------------------------------------------

    def infos(self) -> list[SnapshotInfo]:
        """The checkpoints on disk, oldest first. `path` is the folder's name."""
        with self._changed:
            return sorted(self._infos.values(), key=lambda info: (info.timeline, info.step, info.path))

    def adopt(self, states: Mapping[str, str]) -> None:
        """After a restart: the states that the journal knows, by folder name. Unknown ones stay candidates."""
        with self._changed:
            for name, state in states.items():
                if name in self._infos and self._infos[name].state != INVALID:
                    self._set(name, state)

    def confirm(self, healthy_through: int, confirm: int) -> list[SnapshotInfo]:
        """Call good every candidate that `confirm` healthy steps have followed; returns these."""
        return self._move(CANDIDATE, GOOD, lambda info: info.step + confirm <= healthy_through)

    def mark_suspect(self, from_step: int) -> list[SnapshotInfo]:
        """Checkpoints of `from_step` and later must not be used again; returns the newly marked.

        Call it with the first step of the trouble, or, when the run goes back further, with the first step that is
        done again: of two checkpoints of one step only that of the present timeline may count.
        """
        fits: Callable[[SnapshotInfo], bool] = lambda info: info.step >= from_step  # noqa: E731
        return self._move(CANDIDATE, SUSPECT, fits) + self._move(GOOD, SUSPECT, fits)

    def _move(self, before: str, after: str, fits: Callable[[SnapshotInfo], bool]) -> list[SnapshotInfo]:
        with self._changed:
            names = [name for name, info in self._infos.items() if info.state == before and fits(info)]
            return [self._set(name, after) for name in names]

    def _set(self, name: str, state: str) -> SnapshotInfo:
        self._infos[name] = msgspec.structs.replace(self._infos[name], state=state)
        return self._infos[name]

    def prune(self, now: int) -> None:
        """Delete what retention does not keep, in the background; `pruned` events follow.

        What is to stay is looked at first (manifest, sizes): one that has been damaged keeps no other from staying.
        """
        if self.rank != 0:
            return
        while True:
            going = superfluous(self.infos(), keep=self.keep, now=now, delay=self.delay_steps)
            if not going:
                return
            damaged = next(
                (info for info in self.infos() if info.state == GOOD and info not in going and not self._stands(info)),
                None,
            )
            if damaged is None:
                break
        with self._changed:
            for info in going:
                del self._infos[info.path]
            self._tasks.append(_Task(remove=going))
            self._changed.notify_all()
        self._ensure_thread()

    def _stands(self, info: SnapshotInfo) -> bool:
        try:
            verify(self.folder / info.path, files=())
        except CheckpointInvalid as error:
            self._refused(info.path, str(error))
            return False
        return True

    def _refused(self, name: str, reason: str) -> None:
        with self._changed:
            info = self._infos.get(name)
            if info is not None and info.state != INVALID:
                self._set(name, INVALID)
                self._events.append(
                    CheckpointEvent(state=INVALID, step=info.step, timeline=info.timeline, name=name, reason=reason)
                )

    # -- loading, collective -------------------------------------------------------------------------------------

    def newest_valid(self, allowed: Allowed = lambda manifest: True, progress: Progress | None = None) -> Selection:
        """The newest checkpoint that holds, its hashes checked by the ranks in shares; all ranks agree.

        Args:
            allowed: rank 0's answer counts: True, or False or a reason for passing this one over.
            progress: called with (bytes hashed, bytes to hash) of this rank's share of one checkpoint.
        """
        names = self._gathered([path.name for path in checkpoint_dirs(self.folder)])[0]
        refused: list[tuple[Path, str]] = []
        for name in names:
            path = self.folder / name
            manifest, reason = self._examined(path, allowed, progress)
            if manifest is not None and not reason:
                self._verified = path
                return Selection(path=path, manifest=manifest, refused=tuple(refused))
            refused.append((path, reason))
        return Selection(refused=tuple(refused))

    def _examined(self, path: Path, allowed: Allowed, progress: Progress | None) -> tuple[Manifest | None, str]:
        """(manifest, "") if the checkpoint holds and may be used; else why not. The same on every rank."""
        manifest, broken, verdict = None, "", ""
        try:
            manifest = read_manifest(path)
            answer = allowed(manifest)
            verdict = "" if answer is True else answer or "not to be used"
        except CheckpointInvalid as error:
            broken = str(error)
        answers = self._gathered((broken, verdict))
        broken = next((why for why, _ in answers if why), "")
        if not broken and answers[0][1]:
            return manifest, answers[0][1]
        if not broken and manifest is not None:
            try:
                mine = [file.name for file in manifest.files][self.rank :: self.world]
                verify(path, mine, progress)
            except CheckpointInvalid as error:
                broken = str(error)
            broken = next(filter(None, self._gathered(broken)), "")
        if broken:
            self._refused(path.name, broken)
        return manifest, broken

    def load(self, path: Path, *, weights_only: bool = False) -> Loaded:
        """Load a checkpoint into the live state, on every rank; saved by any number of ranks, ddp or fsdp.

        Args:
            weights_only: leave optimizer and schedule as they are: the only way to use a checkpoint without moments.

        Raises:
            CheckpointInvalid: on every rank, if it does not hold or fit on any. Nothing live has been touched then.
        """
        manifest, parts, boxes = self._read(path, weights_only=weights_only)
        if weights_only:
            self.state.load_weights(parts)
        else:
            self.state.load(parts, manifest.scalars, boxes)
        own = manifest.ranks[self.rank].extra if manifest.world == self.world else None
        return Loaded(
            path=path,
            manifest=manifest,
            extra=plain.decode(manifest.extra if own is None else own),
            checks=self._compared(manifest, weights_only=weights_only),
        )

    def _read(self, path: Path, *, weights_only: bool) -> tuple[Manifest, dict[str, Tensor], dict[str, Box]]:
        """The parts of this rank in host memory; raises on every rank what went wrong on any."""
        verified, self._verified = self._verified, None
        if path != verified:
            _, broken = self._examined(path, lambda manifest: True, None)
            if broken:
                raise CheckpointInvalid(broken)
        problem, outcome = "", None
        try:
            manifest = read_manifest(path)
            boxes = self._wanted(manifest, weights_only=weights_only)
            outcome = manifest, read_parts(path, manifest, boxes), boxes
        except (CheckpointInvalid, OSError, RuntimeError, MemoryError) as error:
            reason = reason_of(error)
            problem = reason if path.name in reason else f"{path.name}: {reason}"
        problem = next(filter(None, self._gathered(problem)), "")
        if outcome is None or problem:
            raise CheckpointInvalid(problem)
        return outcome

    def _wanted(self, manifest: Manifest, *, weights_only: bool) -> dict[str, Box]:
        """Name -> this rank's part of each tensor to be loaded, once everything is known to fit."""
        unknown = [name for name, tensor in manifest.tensors.items() if tensor.dtype not in DTYPES]
        refuse(f"{name} is of type {manifest.tensors[name].dtype}, unknown to torch" for name in unknown)
        found = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in manifest.tensors.items()}
        refuse(self.state.differences(found, weights_only=weights_only))
        if not weights_only:
            self._refuse_cold(manifest)
            self.state.check_scalars(manifest.scalars)
        names = [name for name in found if not (weights_only and name.startswith(OPTIM))]
        return {name: self.state.box(name, manifest.tensors[name].shape) for name in names}

    def _refuse_cold(self, manifest: Manifest) -> None:
        """Training on with cold moments looks like a success and is a loss spike some steps later."""
        if manifest.step == 0 or any(name.startswith(OPTIM) for name in manifest.tensors):
            return
        if not manifest.stateless or self.state.stateless() is False:
            raise CheckpointInvalid(
                f"it was saved after step {manifest.step} and holds no optimizer state: resuming would restart "
                "the moments at zero; load it with weights_only=True if that is meant"
            )

    def _compared(self, manifest: Manifest, *, weights_only: bool) -> dict[str, str]:
        """The live state's digests against the saved ones, wherever a rank holds now what a rank held then."""
        now = self.state.digests()
        saved: dict[str, str] = {"schedule": manifest.ranks[0].digests["schedule"]}
        if manifest.strategy == self.strategy == "ddp":
            saved = manifest.ranks[0].digests
        elif manifest.strategy == self.strategy and manifest.world == self.world:
            saved = manifest.ranks[self.rank].digests
        if weights_only:
            saved = {name: digest for name, digest in saved.items() if name in ("weights", "buffers")}
        mine = {name: now.get(name) == digest for name, digest in saved.items()}
        everyone = self._gathered(mine)
        checks = {}
        for name in mine:
            wrong = [str(rank) for rank, theirs in enumerate(everyone) if not theirs.get(name, True)]
            checks[name] = f"differs on rank {', '.join(wrong)}" if wrong else "ok"
        return checks | ({"moments": "cold", "schedule": "cold"} if weights_only else {})

    def _gathered(self, value: Any) -> Sequence[Any]:
        """Every rank's value, by rank; a collective."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    # -- the background thread -----------------------------------------------------------------------------------

    def _ensure_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="guardrail-checkpoints", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # where it cannot be had, writing competes with training
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closing)
                if not self._tasks:
                    return
                task = self._running = self._tasks.pop(0)
            events = self._performed(task)
            with self._changed:
                self._events += events
                self._running = None
                self._changed.notify_all()

    def _performed(self, task: _Task) -> list[CheckpointEvent]:
        if task.job is None:
            return [event for info in task.remove for event in self._removed(info)]
        snapshot = task.job.snapshot
        try:
            if task.superseded:
                raise TimeoutError("superseded by a later save before its turn came")
            return self._saved(task, task.job)
        except BaseException as error:
            # Everything: SafetensorError, RuntimeError without errno, MemoryError, CheckpointException, which derives
            # from BaseException. This thread has no caller that an exception could reach, and the next save needs it.
            reason = reason_of(error)
            withdraw(task.job, reason)
            with self._changed:
                # A save that was superseded has its retry already.
                if not task.superseded:
                    self._failed_at = time.monotonic()
            return [
                CheckpointEvent(
                    state="failed",
                    step=snapshot.step,
                    timeline=snapshot.timeline,
                    bytes=snapshot.bytes,
                    reason=reason,
                    seconds=time.monotonic() - task.asked,
                )
            ]
        finally:
            if not task.superseded:
                snapshot.release()

    def _saved(self, task: _Task, job: Job) -> list[CheckpointEvent]:
        if self.rank != 0:
            write_share(job)
            return []
        sweep(self.folder, spare=lambda name: name >= job.folder.name)
        own = write_share(job)
        reports = collect(job, own, seconds=self.commit_seconds, given_up=lambda: self._closing)
        path, manifest = commit(job, reports)
        with self._changed:
            self._failed_at = None
            self._infos[path.name] = _info(path.name, manifest)
        return [
            CheckpointEvent(
                state=CANDIDATE,
                step=manifest.step,
                timeline=manifest.timeline,
                name=path.name,
                bytes=manifest.bytes,
                reason=manifest.warning,
                seconds=time.monotonic() - task.asked,
            )
        ]

    def _removed(self, info: SnapshotInfo) -> list[CheckpointEvent]:
        try:
            remove(self.folder / info.path, aside=self.folder / f"{TEMPORARY}{self._nonce}-gone-{info.path}")
        except OSError as error:
            with contextlib.suppress(OSError):
                if (self.folder / info.path).exists():
                    with self._changed:
                        self._infos[info.path] = info
            return [_removal("failed", info, f"could not be deleted: {reason_of(error)}")]
        return [_removal("pruned", info, "")]


def _removal(state: str, info: SnapshotInfo, reason: str) -> CheckpointEvent:
    return CheckpointEvent(
        state=state, step=info.step, timeline=info.timeline, name=info.path, bytes=info.bytes, reason=reason
    )


def _info(name: str, manifest: Manifest, state: str = CANDIDATE) -> SnapshotInfo:
    return SnapshotInfo(
        step=manifest.step,
        cursor=manifest.cursor,
        timeline=manifest.timeline,
        tier="disk",
        state=state,
        time=manifest.time,
        bytes=manifest.bytes,
        path=name,
    )


def _info_on_disk(path: Path) -> SnapshotInfo:
    try:
        return _info(path.name, read_manifest(path))
    except CheckpointInvalid:
        step = int(path.name.removeprefix("step-").split("-")[0])
        return SnapshotInfo(step=step, cursor=0, timeline=0, tier="disk", state=INVALID, path=path.name)
