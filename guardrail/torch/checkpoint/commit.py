"""One save, rank by rank: each writes its share, rank 0 waits for the others and commits with one
rename.

Runs on background threads, where a collective would meet those of the training step in another
order on another rank: the file system is the channel. A rank that is done renames `rank-00001.json`
into the temporary folder, one that failed leaves `rank-00001.failed`; rank 0 reads them, writes the
manifest last, and renames the folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import GuardrailError
from guardrail.core.files import (
    FILE_MODE,
    FOLDER_MODE,
    TEMPORARY,
    read_file,
    replace_file,
    sync_folder,
    write_all,
)
from guardrail.core.records import Record
from guardrail.rundir.manifest import (
    BUFFER,
    FORMAT,
    MANIFEST,
    Box,
    FileEntry,
    Manifest,
    Piece,
    RankEntry,
    Shape,
    TensorEntry,
    checkpoint_name,
    covers,
    sealed,
    verify,
)
from guardrail.torch.checkpoint.memory_snapshots import Snapshot
from guardrail.torch.checkpoint.safetensors_file import dtype_name, write_file
from guardrail.torch.state import json_codec as plain
from guardrail.torch.state.digests import component_digests

_MARGIN = 1 << 20  # bytes left over for the manifest and for the file system itself
_COPIES = 1000  # names tried for the same step and timeline


class SaveFailed(GuardrailError):
    """A checkpoint could not be written or committed; training goes on."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A save that has been asked for. Equal on every rank but for the snapshot's content.

    Attributes:
        folder: the temporary folder; its name is the same on all ranks and of no other save.
        strategy, world, identity, stateless: as the manifest will say.
        like: the first rank that holds the same part of the model as this one.
        serial: counts the saves of this start, from 1.
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


class PartReport(Record, frozen=True, kw_only=True):
    """A piece that a rank has written."""

    dtype: str
    shape: Shape
    offset: Shape
    size: Shape


class RankReport(Record, frozen=True, kw_only=True):
    """rank-00000.json: what a rank has written. `names`: a hash of its tensors' names, equal to
    that of rank `like`.
    """

    rank: int
    file: FileEntry
    parts: dict[str, PartReport]
    names: str
    digests: dict[str, str]
    extra: dict[str, Any]
    like: int = 0


def share(snapshot: Snapshot) -> list[str]:
    """The tensors that this rank writes: of those that several ranks hold, each goes to the one
    with least so far.

    Every rank computes the same distribution from names and sizes. Buffers are rank 0's, as in DDP.
    """
    sizes = {
        name: tensor.numel() * tensor.element_size() for name, tensor in snapshot.tensors.items()
    }
    loads: dict[int, list[int]] = {}
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        index, count = snapshot.replicas[name]
        load = loads.setdefault(count, [0] * count)
        writer = 0 if name.startswith(BUFFER) else load.index(min(load))
        load[writer] += sizes[name]
        if writer == index and sizes[name]:
            mine.append(name)
    return mine


def write_share(job: Job) -> RankReport:
    """Write this rank's file into the temporary folder and report it there.

    Raises:
        OSError, SaveFailed, RuntimeError: whatever went wrong; see `withdraw`.
    """
    snapshot = job.snapshot
    snapshot.wait()
    tensors = snapshot.tensors
    job.folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    _check_room(job)
    mine = {name: tensors[name] for name in share(snapshot)}
    file = write_file(job.folder / f"rank-{job.rank:05d}.safetensors", mine)
    parts = {
        name: PartReport(
            dtype=dtype_name(tensor.dtype),
            shape=snapshot.boxes[name].global_shape,
            offset=snapshot.boxes[name].offset,
            size=snapshot.boxes[name].size,
        )
        for name, tensor in mine.items()
    }
    report = RankReport(
        rank=job.rank,
        file=file,
        parts=parts,
        names=hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest(),
        digests=component_digests(tensors, snapshot.scalars),
        extra=plain.encode(snapshot.extra, "extra"),
        like=job.like,
    )
    replace_file(job.folder / _report_name(job.rank), msgspec.json.encode(report), sync=False)
    return report


def _check_room(job: Job) -> None:
    """Find out beforehand that the disk is too small. What this save has written already is no
    longer missing.
    """
    tensors, boxes = job.snapshot.tensors, job.snapshot.boxes
    total = sum(
        math.prod(boxes[name].global_shape) * tensor.element_size()
        for name, tensor in tensors.items()
    )
    written = sum(
        entry.stat().st_size
        for entry in os.scandir(job.folder)
        if entry.name.endswith(".safetensors")
    )
    usage = shutil.disk_usage(job.folder)
    if usage.total and usage.free < total - written + _MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {(total + _MARGIN) / 1e6:.1f} MB are needed, {usage.free / 1e6:.1f} MB free",
        )


def withdraw(job: Job, reason: str) -> None:
    """After a failure of this rank: remove its partial file and let rank 0 know. Never raises
    OSError.
    """
    with contextlib.suppress(OSError):
        (job.folder / f"rank-{job.rank:05d}.safetensors").unlink(missing_ok=True)
    if job.rank == 0:
        shutil.rmtree(job.folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        job.folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        # The name alone says it: an empty file can be created on a disk that has no room for the
        # reason.
        descriptor = os.open(
            job.folder / _failed_name(job.rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE
        )
        try:
            write_all(descriptor, reason.encode(errors="replace"))
        finally:
            os.close(descriptor)


def collect(
    job: Job,
    own: RankReport,
    *,
    seconds: float,
    given_up: Callable[[], bool],
    failed: Callable[[], Collection[int]] = tuple,
) -> list[RankReport]:
    """Rank 0: wait for every rank's report.

    Args:
        failed: ranks that have said, by another way than the file system, that they could not write
        their share.

    Raises:
        SaveFailed: a rank failed, was silent for `seconds`, or `given_up()` came true.
    """
    reports = {own.rank: own}
    deadline = time.monotonic() + seconds
    while len(reports) < job.world:
        known = set(failed())  # before the folder is read: a share that is there counts
        for rank in range(job.world):
            if rank not in reports:
                failure = job.folder / _failed_name(rank)
                if failure.exists():
                    why = read_file(failure).decode("utf-8", "replace")
                    raise SaveFailed(f"rank {rank}: {why or 'no room to say why'}")
                with contextlib.suppress(FileNotFoundError):
                    content = read_file(job.folder / _report_name(rank))
                    reports[rank] = msgspec.json.decode(content, type=RankReport)
        silent = sorted(set(range(job.world)) - set(reports))
        if refused := sorted(known & set(silent)):
            raise SaveFailed(f"rank {refused[0]}: its disk refuses the share, and the reason too")
        if silent and (given_up() or time.monotonic() > deadline):
            raise SaveFailed(f"rank {silent[0]} has not written its share")
        if silent:
            time.sleep(0.01)
    return [reports[rank] for rank in range(job.world)]


def commit(
    job: Job, reports: list[RankReport], suspect: Callable[[], bool] = lambda: False
) -> tuple[Path, Manifest]:
    """Rank 0: write the manifest, check the folder, and make it a checkpoint with one rename.

    Every file was synced and read back by the rank that wrote it; here sizes, headers and the
    manifest are.

    Args:
        suspect: whether the state holds an unresolved incident; asked again right before the
        rename.

    Raises:
        SaveFailed: the shares do not make up the state. OSError, CheckpointInvalid: as they come.
    """
    manifest = _manifest(job, reports, suspect=suspect())
    _write_synced(job.folder / MANIFEST, sealed(manifest))
    for report in reports:
        (job.folder / _report_name(report.rank)).unlink(missing_ok=True)
    sync_folder(job.folder)
    verify(job.folder, files=())
    if suspect() and not manifest.suspect:  # the incident was noticed meanwhile
        manifest = msgspec.structs.replace(manifest, suspect=True)
        replace_file(job.folder / MANIFEST, sealed(manifest))
    path = _rename(job)
    sync_folder(path.parent)
    return path, manifest


def _manifest(job: Job, reports: list[RankReport], *, suspect: bool) -> Manifest:
    snapshot, first = job.snapshot, reports[0]
    stranger = next((r for r in reports if r.names != reports[r.like].names), None)
    if stranger is not None:
        raise SaveFailed(
            f"rank {stranger.rank} holds tensors of other names than rank {stranger.like}"
        )
    tensors: dict[str, TensorEntry] = {}
    kinds = {
        name: (box.global_shape, dtype_name(snapshot.tensors[name].dtype))
        for name, box in snapshot.boxes.items()
    }
    for report in reports:  # of the other stages of a pipeline
        kinds |= {
            name: (part.shape, part.dtype)
            for name, part in report.parts.items()
            if name not in kinds
        }
    for name, (shape, dtype) in kinds.items():
        parts = [(r.file.name, r.parts[name]) for r in reports if name in r.parts]
        boxes = [
            Box(global_shape=part.shape, offset=part.offset, size=part.size) for _, part in parts
        ]
        if any(part.shape != shape or part.dtype != dtype for _, part in parts) or not covers(
            shape, boxes
        ):
            raise SaveFailed(f"the ranks' shares of {name} do not make up its shape {list(shape)}")
        pieces = tuple(Piece(file=file, offset=part.offset, size=part.size) for file, part in parts)
        tensors[name] = TensorEntry(dtype=dtype, shape=shape, pieces=pieces)
    return Manifest(
        format=FORMAT,
        step=snapshot.step,
        timeline=snapshot.timeline,
        cursor=snapshot.cursor,
        world=job.world,
        strategy=job.strategy,
        time=snapshot.time,
        identity=job.identity,
        warning=_drift(job, reports),
        stateless=job.stateless,
        files=tuple(report.file for report in reports),
        ranks=tuple(
            RankEntry(
                rank=r.rank, digests=r.digests, extra=None if r.extra == first.extra else r.extra
            )
            for r in reports
        ),
        scalars=snapshot.scalars,
        extra=first.extra,
        tensors=tensors,
        suspect=suspect,
    )


def _drift(job: Job, reports: list[RankReport]) -> str:
    """Replicas must be bit-identical; where they are not, the ranks have been training different
    models.
    """
    if job.strategy != "ddp":
        return ""
    for component in ("weights", "moments"):
        drifted = [
            r.rank for r in reports if r.digests.get(component) != reports[0].digests.get(component)
        ]
        if drifted:
            ranks = ", ".join(map(str, drifted[:8]))
            return f"the {component} of rank {ranks} are not those of rank 0: the replicas have drifted apart"
    return ""


def _rename(job: Job) -> Path:
    """To the first free name. A checkpoint that is there is never replaced, so there is no moment
    without it.
    """
    parent, snapshot = job.folder.parent, job.snapshot
    names = [checkpoint_name(snapshot.step)]
    names += [checkpoint_name(snapshot.step, snapshot.timeline, copy) for copy in range(_COPIES)]
    for name in names:
        target = parent / name
        if not target.exists():
            try:
                job.folder.rename(target)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    continue
                raise
            return target
    raise SaveFailed(f"{_COPIES} checkpoints of step {snapshot.step} exist already")


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path, *, aside: Path) -> None:
    """Delete a checkpoint: renamed first, so that a half-deleted one never looks like a
    checkpoint.
    """
    path.rename(aside)
    sync_folder(aside.parent)
    shutil.rmtree(aside)


def sweep(folder: Path, *, spare: Callable[[str], bool] = lambda name: False) -> None:
    """Remove temporary folders that dead or failed writers have left."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not spare(path.name):
            shutil.rmtree(path, ignore_errors=True)


def reason_of(error: BaseException) -> str:
    """One line for the journal, whatever was raised."""
    if isinstance(error, OSError) and error.strerror:
        where = (
            f" ({Path(os.fsdecode(error.filename)).name})"
            if isinstance(error.filename, (str, bytes))
            else ""
        )
        return f"{error.strerror}{where}"
    if isinstance(error, GuardrailError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _report_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _failed_name(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
