"""One rank's tensors as a safetensors file: written, synced, read back and compared; and pieces put
together again.

The writer is our own twenty lines, because the library's holds the interpreter lock while it
writes, and training would wait for the disk. The format is theirs:
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
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"safetensors has no type for {dtype}")
    return DTYPE_NAMES[dtype]


class ReadBackDiffers(RuntimeError):
    """The disk gave other bytes back than were written to it."""


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file and prove that the disk holds it.

    The file is synced, dropped from the page cache where the kernel allows it, and read back: every
    byte is compared with memory, and the SHA-256 is that of what was read.

    Args:
        path: a file that does not exist.
        tensors: name -> host tensor; they must not change meanwhile.

    Raises:
        OSError: as the system says it; a partial file may be left.
        ReadBackDiffers: the comparison failed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        size = 0
        for chunk in _chunks(tensors):
            write_all(descriptor, chunk.data)  # type: ignore[arg-type]  # any buffer will do
            size += len(chunk)
        os.fsync(descriptor)
        # not every system and file system has it
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
                    raise ReadBackDiffers(
                        f"{path.name} is shorter on the disk than what was written"
                    )
                got += count
            if not np.array_equal(buffer[:got], expected):
                raise ReadBackDiffers(
                    f"{path.name} reads back other bytes than were written: the disk is failing"
                )
            digest.update(buffer.data[:got])
    return digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The bytes of the file, in pieces of at most _CHUNK. Largest types first, so that every tensor
    lies aligned.
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
    """Put together the named parts of the whole tensors, from whichever files hold pieces of them.

    A part that one piece holds completely is a view of the file, read when it is copied.

    Raises:
        CheckpointInvalid: a file cannot be read, or no piece holds some element.
    """
    with contextlib.ExitStack() as stack:
        try:
            files = {
                file.name: stack.enter_context(safe_open(folder / file.name, framework="pt"))
                for file in manifest.files
            }
            return {name: _part(name, manifest, box, files) for name, box in boxes.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointInvalid(f"{folder.name}: a file cannot be read ({error})") from error


def _part(name: str, manifest: Manifest, box: Box, files: Mapping[str, Any]) -> Tensor:
    entry = manifest.tensors[name]
    target: Tensor | None = None
    filled = 0
    for piece, held in zip(entry.pieces, entry.boxes(), strict=True):
        if held == box:
            whole: Tensor = files[piece.file].get_tensor(name)
            return whole
        common = held.overlap(box)
        if common is not None:
            if target is None:
                target = torch.empty(box.size, dtype=DTYPES[entry.dtype])
            target[common.slices(box)] = files[piece.file].get_slice(name)[common.slices(held)]
            filled += common.elements
    if filled != box.elements:
        raise CheckpointInvalid(f"the pieces of {name} leave a part of it out")
    return target if target is not None else torch.empty(box.size, dtype=DTYPES[entry.dtype])
