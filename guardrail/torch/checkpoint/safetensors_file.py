"""Safetensors files: write, sync, read back and compare one rank's file; read parts of tensors.

guardrail has its own writer of twenty lines: the library's holds the interpreter lock while it
writes, so training would wait for the disk. The format is that of the library:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from guardrail.core.errors import CheckpointInvalid, UsageError
from guardrail.core.files import FILE_MODE, write_all
from guardrail.rundir.manifest import Box, FileEntry, Manifest
from guardrail.torch.state.digests import raw_bytes

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_CHUNK = 4 << 20  # bytes of one write, one read and one comparison


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type in the format; UsageError if it has none."""
    if dtype not in DTYPE_NAMES:
        raise UsageError(
            f"a tensor has type {dtype}, which safetensors files do not have. Use another type."
        )
    return DTYPE_NAMES[dtype]


class ReadBackDiffers(RuntimeError):
    """The disk returned other bytes than were written to it."""


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file and check that the disk holds it.

    The file is synced, dropped from the page cache if the kernel allows it, and read back. Every
    byte is compared with memory. The SHA-256 is that of the bytes read.

    Args:
        path: a file that does not exist.
        tensors: name -> host tensor; they must not change meanwhile.

    Raises:
        OSError: of the system; a partial file may be left.
        ReadBackDiffers: the comparison failed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        size = 0
        for chunk in _chunks(tensors):
            write_all(descriptor, chunk.data)  # type: ignore[arg-type]  # any buffer is accepted
            size += len(chunk)
        os.fsync(descriptor)
        # Not every system and file system has it.
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return FileEntry(name=path.name, bytes=size, sha256=_read_back(descriptor, path, tensors))
    finally:
        os.close(descriptor)


def _read_back(descriptor: int, path: Path, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    buffer = np.empty(_CHUNK, dtype=np.uint8)
    with open(descriptor, "rb", buffering=0, closefd=False) as stream:
        for expected in _chunks(tensors):
            got = 0
            while got < len(expected):
                count = stream.readinto(buffer.data[got : len(expected)])
                if not count:
                    raise ReadBackDiffers(f"{path.name} is shorter on the disk than written")
                got += count
            if not np.array_equal(buffer[:got], expected):
                raise ReadBackDiffers(
                    f"{path.name} reads back other bytes than were written: the disk is failing"
                )
            digest.update(buffer.data[:got])
    return digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return the bytes of the file, in pieces of at most _CHUNK.

    The largest types come first, so every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield np.frombuffer(len(text).to_bytes(8, "little"), dtype=np.uint8)
    for start in range(0, len(text), _CHUNK):
        yield np.frombuffer(text[start : start + _CHUNK], dtype=np.uint8)
    for _, tensor in ordered:
        content = raw_bytes(tensor)
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK]


def read_parts(folder: Path, manifest: Manifest, boxes: Mapping[str, Box]) -> dict[str, Tensor]:
    """Return the named parts of tensors, assembled from the files that hold pieces of them.

    A part that equals one piece is a view of the file; it is read when it is copied.

    Args:
        boxes: name -> part of the tensor.

    Raises:
        CheckpointInvalid: a file cannot be read, or no piece holds some element.
    """
    with contextlib.ExitStack() as stack:
        try:
            files: dict[str, Any] = {}
            for file in manifest.files:
                opened = safe_open(folder / file.name, framework="pt")
                files[file.name] = stack.enter_context(opened)
            return {name: _read_part(name, manifest, box, files) for name, box in boxes.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointInvalid(f"{folder.name}: a file cannot be read ({error})") from error


def _read_part(name: str, manifest: Manifest, box: Box, files: Mapping[str, Any]) -> Tensor:
    entry = manifest.tensors[name]
    pieces = list(zip(entry.pieces, entry.boxes(), strict=True))
    for piece, held in pieces:
        if held == box:
            tensor: Tensor = files[piece.file].get_tensor(name)
            return tensor
    target = torch.empty(box.size, dtype=DTYPES[entry.dtype])
    filled = 0
    for piece, held in pieces:
        common = held.overlap(box)
        if common is not None:
            content = files[piece.file].get_slice(name)[common.slices(held)]
            target[common.slices(box)] = content
            filled += common.elements
    if filled != box.elements:
        raise CheckpointInvalid(f"the pieces of {name} do not cover it")
    return target
