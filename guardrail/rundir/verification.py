"""Check that the files of a checkpoint are unchanged, and compute one hash of its parameters.

Reads plain bytes, without torch and pickle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from guardrail.core.errors import CheckpointInvalid
from guardrail.rundir.manifest import (
    MODEL,
    Box,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    read_manifest,
    refuse_link,
)
from guardrail.rundir.safetensors_header import ITEM_BYTES, HeaderEntry, read_header

Progress = Callable[[int, int], None]
_CHUNK = 1 << 20


def verify(
    folder: Path, files: Iterable[str] | None = None, progress: Progress | None = None
) -> Manifest:
    """Check a checkpoint without changing anything.

    Args:
        folder: the checkpoint.
        files: names of the files whose SHA-256 is computed; None: all. Sizes and headers are
            checked for all of them in any case.
        progress: called with (bytes hashed, bytes to hash).

    Raises:
        CheckpointInvalid: names the file and says in one sentence what is wrong with it.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        _check_size(folder, file)
    if files is None:
        files = [file.name for file in manifest.files]
    chosen = set(files)
    total = sum(file.bytes for file in manifest.files if file.name in chosen)
    done = 0
    for file in manifest.files:
        if file.name in chosen:
            digest, done = _hashed(folder, file, done, total, progress)
            if digest != file.sha256:
                raise CheckpointInvalid(
                    f"{folder.name}/{file.name}: its content is not what was written "
                    f"(SHA-256 {digest[:12]}..., the manifest says {file.sha256[:12]}...)",
                    kind="changed",
                )
    _check_headers(folder, manifest)
    return manifest


def _check_size(folder: Path, file: FileEntry) -> None:
    try:
        found = (folder / file.name).lstat()
    except FileNotFoundError as error:
        raise CheckpointInvalid(f"{folder.name}/{file.name} is missing", kind="missing") from error
    except OSError as error:
        raise CheckpointInvalid(
            f"{folder.name}/{file.name} cannot be read ({error.strerror})", kind="unreadable"
        ) from error
    refuse_link(folder, file.name, found.st_mode)
    size = found.st_size
    if size != file.bytes:
        how, kind = "too long", "too_long"
        if size < file.bytes:
            how, kind = "cut off", "cut_off"
        raise CheckpointInvalid(
            f"{folder.name}/{file.name} is {how}: {size} bytes, the manifest says {file.bytes}",
            kind=kind,
        )


def _hashed(
    folder: Path, file: FileEntry, done: int, total: int, progress: Progress | None
) -> tuple[str, int]:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    try:
        with open(folder / file.name, "rb", buffering=0) as stream:
            while count := stream.readinto(view):
                digest.update(view[:count])
                done += count
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise CheckpointInvalid(
            f"{folder.name}/{file.name} cannot be read ({error.strerror})", kind="unreadable"
        ) from error
    return digest.hexdigest(), done


def _check_headers(folder: Path, manifest: Manifest) -> None:
    headers = {file.name: read_header(folder / file.name)[0] for file in manifest.files}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            held = headers[piece.file].get(name)
            if held is None or (held.dtype, held.shape) != (tensor.dtype, piece.size):
                raise CheckpointInvalid(
                    f"{folder.name}/{piece.file} does not hold the piece of {name} it should",
                    kind="missing_piece",
                )


def fingerprint(folder: Path) -> str:
    """Return one SHA-256 of all parameters. It depends neither on the ranks nor on the sharding.

    It covers the tensors "model/...", by name: a line `name dtype shape`, then all bytes of the
    tensor in row-major order. Buffers and optimizer moments are not part of it. At most one tensor
    is in memory at a time, and only if its pieces interleave. The hashes of the files are not
    checked; see `verify`.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        _check_size(folder, file)
    digest = hashlib.sha256()
    headers = {file.name: read_header(folder / file.name) for file in manifest.files}
    for name in sorted(manifest.tensors):
        if name.startswith(MODEL):
            tensor = manifest.tensors[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for part in _row_major(folder, name, tensor, headers):
                digest.update(part)
    return digest.hexdigest()


def _row_major(
    folder: Path,
    name: str,
    tensor: TensorEntry,
    headers: dict[str, tuple[dict[str, HeaderEntry], int]],
) -> Iterable[Any]:
    """Yield the bytes of a tensor in row-major order, in parts.

    The bytes of an element are one more dimension.
    """
    import numpy as np

    item = ITEM_BYTES[tensor.dtype]

    def content(piece: Piece) -> Any:
        entries, start = headers[piece.file]
        if name not in entries:
            raise CheckpointInvalid(
                f"{folder.name}/{piece.file} does not hold {name}", kind="missing_piece"
            )
        begin, end = entries[name].data_offsets
        if end - begin != item * math.prod(piece.size):
            raise CheckpointInvalid(
                f"{folder.name}/{piece.file}: {name} has another size than the manifest says",
                kind="other_size",
            )
        shape = (*piece.size, item)
        if begin == end:
            return np.empty(shape, dtype=np.uint8)
        return np.memmap(
            folder / piece.file, dtype=np.uint8, mode="r", offset=start + begin, shape=shape
        )

    pieces = sorted(tensor.pieces, key=lambda piece: piece.offset)
    if all(piece.size[1:] == tensor.shape[1:] for piece in pieces):  # each piece: complete rows
        yield from map(content, pieces)
        return
    complete = np.empty((*tensor.shape, item), dtype=np.uint8)
    for piece in pieces:
        box = Box(global_shape=tensor.shape, offset=piece.offset, size=piece.size)
        complete[box.slices(Box.of_shape(tensor.shape))] = content(piece)
    yield complete
