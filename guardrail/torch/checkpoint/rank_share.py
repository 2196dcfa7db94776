"""The share of one rank in a save: which tensors it writes, its file, and its report."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil

import msgspec

from guardrail.core.files import FILE_MODE, FOLDER_MODE, replace_file, write_all
from guardrail.rundir.manifest import BUFFER
from guardrail.torch.checkpoint.memory_snapshots import Snapshot
from guardrail.torch.checkpoint.safetensors_file import dtype_name, write_file
from guardrail.torch.checkpoint.save_job import PartReport, RankReport, SaveJob
from guardrail.torch.state import json_codec
from guardrail.torch.state.digests import component_digests

_MARGIN = 1 << 20  # free bytes needed for the manifest and for the file system


def assign_tensors(snapshot: Snapshot) -> list[str]:
    """Return the names of the tensors that this rank writes.

    A tensor that several ranks hold goes to the one with the fewest bytes so far. Every rank
    computes the same distribution from names and sizes. Rank 0 writes the buffers, as in DDP.
    """
    sizes = {
        name: tensor.numel() * tensor.element_size() for name, tensor in snapshot.tensors.items()
    }
    loads: dict[int, list[int]] = {}
    own = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        index, count = snapshot.replicas[name]
        load = loads.setdefault(count, [0] * count)
        writer = 0 if name.startswith(BUFFER) else load.index(min(load))
        load[writer] += sizes[name]
        if writer == index and sizes[name]:
            own.append(name)
    return own


def write_share(job: SaveJob) -> RankReport:
    """Write this rank's file into the temporary folder, and its report beside it.

    Raises:
        OSError, SaveFailed, RuntimeError: what went wrong; call `report_failure` then.
    """
    snapshot = job.snapshot
    snapshot.wait()
    tensors = snapshot.tensors
    job.folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    _check_room(job)
    own = {name: tensors[name] for name in assign_tensors(snapshot)}
    file = write_file(job.data_path(), own)
    parts: dict[str, PartReport] = {}
    for name, tensor in own.items():
        box = snapshot.boxes[name]
        parts[name] = PartReport(
            dtype=dtype_name(tensor.dtype), shape=box.global_shape, offset=box.offset, size=box.size
        )
    report = RankReport(
        rank=job.rank,
        file=file,
        parts=parts,
        names=hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest(),
        digests=component_digests(tensors, snapshot.scalars),
        extra=json_codec.encode(snapshot.extra, "extra"),
        like=job.like,
    )
    replace_file(job.report_path(job.rank), msgspec.json.encode(report), sync=False)
    return report


def _check_room(job: SaveJob) -> None:
    """Raise OSError if the disk has no room for the save. Files already written count as room."""
    needed = _MARGIN
    for name, tensor in job.snapshot.tensors.items():
        shape = job.snapshot.boxes[name].global_shape
        needed += math.prod(shape) * tensor.element_size()
    written = 0
    for entry in os.scandir(job.folder):
        if entry.name.endswith(".safetensors"):
            written += entry.stat().st_size
    usage = shutil.disk_usage(job.folder)
    if usage.total and usage.free < needed - written:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:.1f} MB are needed, "
            f"{usage.free / 1e6:.1f} MB free",
        )


def report_failure(job: SaveJob, reason: str) -> None:
    """Remove this rank's partial file and report the failure to rank 0. Ignores OSError."""
    with contextlib.suppress(OSError):
        job.data_path().unlink(missing_ok=True)
    if job.rank == 0:
        shutil.rmtree(job.folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        job.folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        # The name alone says that it failed: a disk that has no room for the reason may still have
        # room for an empty file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(job.failure_path(job.rank), flags, FILE_MODE)
        try:
            write_all(descriptor, reason.encode(errors="replace"))
        finally:
            os.close(descriptor)
