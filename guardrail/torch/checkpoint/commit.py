"""Rank 0 commits a save: it waits for the shares of all ranks, then renames the folder once.

This runs on background threads. A collective there could meet one of the training step in another
order on another rank, so the ranks communicate by files. A rank that is done renames
`rank-00001.json` into the temporary folder; one that failed leaves `rank-00001.failed`. Rank 0
reads these, writes the manifest last, and renames the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from guardrail.core.files import (
    FILE_MODE,
    TEMPORARY,
    read_file,
    replace_file,
    sync_folder,
    write_all,
)
from guardrail.rundir.checkpoint_folders import checkpoint_name
from guardrail.rundir.manifest import (
    FORMAT,
    MANIFEST,
    Box,
    Manifest,
    Piece,
    RankEntry,
    TensorEntry,
    covers,
    sealed,
)
from guardrail.rundir.safetensors_header import Shape
from guardrail.rundir.verification import verify
from guardrail.torch.checkpoint.safetensors_file import dtype_name
from guardrail.torch.checkpoint.save_job import RankReport, SaveFailed, SaveJob

_MAX_NAMES = 1000  # names tried for one step and timeline


def collect_reports(
    job: SaveJob,
    own: RankReport,
    *,
    seconds: float,
    is_aborted: Callable[[], bool],
    failed: Callable[[], Collection[int]] = tuple,
) -> list[RankReport]:
    """Wait for every rank's report, on rank 0; return them by rank.

    Args:
        seconds: longest time to wait.
        is_aborted: whether to stop waiting.
        failed: ranks that reported, by another way than the file system, that their share failed.

    Raises:
        SaveFailed: a rank failed or did not report in time.
    """
    reports = {own.rank: own}
    deadline = time.monotonic() + seconds
    while len(reports) < job.world:
        known_failed = set(failed())  # before the folder is read: a share that is there counts
        for rank in range(job.world):
            if rank not in reports:
                report = _read_report(job, rank)
                if report is not None:
                    reports[rank] = report
        missing = sorted(set(range(job.world)) - set(reports))
        refused = sorted(known_failed & set(missing))
        if refused:
            raise SaveFailed(f"rank {refused[0]}: its disk refuses the share, and the reason too")
        if missing and (is_aborted() or time.monotonic() > deadline):
            raise SaveFailed(f"rank {missing[0]} has not written its share")
        if missing:
            time.sleep(0.01)
    return [reports[rank] for rank in range(job.world)]


def _read_report(job: SaveJob, rank: int) -> RankReport | None:
    """Return the report of a rank; None if it is not there yet; SaveFailed if the rank failed."""
    failure = job.failure_path(rank)
    if failure.exists():
        why = read_file(failure).decode("utf-8", "replace")
        raise SaveFailed(f"rank {rank}: {why or 'no room to write the reason'}")
    with contextlib.suppress(FileNotFoundError):
        return msgspec.json.decode(read_file(job.report_path(rank)), type=RankReport)
    return None


def commit(
    job: SaveJob, reports: list[RankReport], suspect: Callable[[], bool] = lambda: False
) -> tuple[Path, Manifest]:
    """Write the manifest, check the folder, and make it a checkpoint with one rename; on rank 0.

    The rank that wrote a file has synced it and read it back. Here sizes, headers and the manifest
    are checked.

    Args:
        suspect: whether the state holds an unresolved incident; called again right before the
            rename.

    Raises:
        SaveFailed: the shares do not make up the state.
        OSError, CheckpointInvalid: what went wrong.
    """
    manifest = _build_manifest(job, reports, suspect=suspect())
    _write_synced(job.folder / MANIFEST, sealed(manifest))
    for report in reports:
        job.report_path(report.rank).unlink(missing_ok=True)
    sync_folder(job.folder)
    verify(job.folder, files=())
    if suspect() and not manifest.suspect:  # the incident was detected in between
        manifest = msgspec.structs.replace(manifest, suspect=True)
        replace_file(job.folder / MANIFEST, sealed(manifest))
    path = _rename(job)
    sync_folder(path.parent)
    return path, manifest


def _build_manifest(job: SaveJob, reports: Sequence[RankReport], *, suspect: bool) -> Manifest:
    snapshot, first = job.snapshot, reports[0]
    for report in reports:
        if report.names != reports[report.like].names:
            raise SaveFailed(
                f"rank {report.rank} holds tensors of other names than rank {report.like}"
            )
    ranks: list[RankEntry] = []
    for report in reports:
        extra = None if report.extra == first.extra else report.extra
        ranks.append(RankEntry(rank=report.rank, digests=report.digests, extra=extra))
    return Manifest(
        format=FORMAT,
        step=snapshot.step,
        timeline=snapshot.timeline,
        cursor=snapshot.cursor,
        world=job.world,
        strategy=job.strategy,
        time=snapshot.time,
        identity=job.identity,
        warning=_describe_drift(job, reports),
        stateless=job.stateless,
        files=tuple(report.file for report in reports),
        ranks=tuple(ranks),
        scalars=snapshot.scalars,
        extra=first.extra,
        tensors=_tensor_entries(job, reports),
        suspect=suspect,
    )


def _tensor_entries(job: SaveJob, reports: Sequence[RankReport]) -> dict[str, TensorEntry]:
    """Return name -> entry of each tensor of all ranks; SaveFailed if pieces are missing."""
    entries: dict[str, TensorEntry] = {}
    for name, (shape, dtype) in _tensor_kinds(job, reports).items():
        pieces: list[Piece] = []
        boxes: list[Box] = []
        is_equal = True
        for report in reports:
            part = report.parts.get(name)
            if part is None:
                continue
            is_equal = is_equal and part.shape == shape and part.dtype == dtype
            pieces.append(Piece(file=report.file.name, offset=part.offset, size=part.size))
            boxes.append(Box(global_shape=part.shape, offset=part.offset, size=part.size))
        if not is_equal or not covers(shape, boxes):
            raise SaveFailed(f"the ranks' shares of {name} do not make up its shape {list(shape)}")
        entries[name] = TensorEntry(dtype=dtype, shape=shape, pieces=tuple(pieces))
    return entries


def _tensor_kinds(job: SaveJob, reports: Sequence[RankReport]) -> dict[str, tuple[Shape, str]]:
    """Return name -> (shape, type) of each tensor, also of those of other pipeline stages."""
    kinds: dict[str, tuple[Shape, str]] = {}
    for name, box in job.snapshot.boxes.items():
        kinds[name] = box.global_shape, dtype_name(job.snapshot.tensors[name].dtype)
    for report in reports:
        for name, part in report.parts.items():
            kinds.setdefault(name, (part.shape, part.dtype))
    return kinds


def _describe_drift(job: SaveJob, reports: Sequence[RankReport]) -> str:
    """Return a warning if replicas are not bit-identical; "" if they are.

    Ranks whose replicas differ have been training different models.
    """
    if job.strategy != "ddp":
        return ""
    for component in ("weights", "moments"):
        expected = reports[0].digests.get(component)
        drifted = [r.rank for r in reports if r.digests.get(component) != expected]
        if drifted:
            ranks = ", ".join(map(str, drifted[:8]))
            return (
                f"the {component} of rank {ranks} are not those of rank 0: "
                "the replicas have drifted apart"
            )
    return ""


def _rename(job: SaveJob) -> Path:
    """Rename the folder to the first free name; return its path.

    A checkpoint is never replaced, so there is no moment without it.
    """
    parent, snapshot = job.folder.parent, job.snapshot
    names = [checkpoint_name(snapshot.step)]
    for copy in range(_MAX_NAMES):
        names.append(checkpoint_name(snapshot.step, snapshot.timeline, copy))
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
    raise SaveFailed(f"{_MAX_NAMES} checkpoints of step {snapshot.step} exist already")


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(path: Path, *, aside: Path) -> None:
    """Delete a checkpoint.

    It is renamed to `aside` first: a half-deleted folder never looks like a checkpoint.
    """
    path.rename(aside)
    sync_folder(aside.parent)
    shutil.rmtree(aside)


def remove_temporary(folder: Path, *, spare: Callable[[str], bool] = lambda name: False) -> None:
    """Remove temporary folders that dead or failed writers have left, except those to `spare`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not spare(path.name):
            shutil.rmtree(path, ignore_errors=True)
