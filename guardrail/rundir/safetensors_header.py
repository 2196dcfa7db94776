"""The header of a safetensors file, read as plain bytes, without torch and pickle."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import CheckpointInvalid
from guardrail.core.files import open_file

Shape = tuple[int, ...]
# Bytes of one element, by the name that safetensors gives a type.
ITEM_BYTES = {
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


class HeaderEntry(msgspec.Struct, frozen=True):
    """One tensor in a safetensors header.

    `data_offsets` is the range of bytes [begin, end), counted from the start of the file's data.
    """

    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


def read_header(path: Path) -> tuple[dict[str, HeaderEntry], int]:
    """Return the header of a safetensors file: (tensors by name, offset of the data in bytes).

    Raises:
        CheckpointInvalid: it is not a safetensors file, or its tensors do not fit into it.
    """
    try:
        with (
            open_file(path) as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            length = int.from_bytes(content[:8], "little")
            if len(content) < 8 or not 2 <= length <= min(_HEADER_LIMIT, len(content) - 8):
                raise CheckpointInvalid(f"{path.parent.name}/{path.name} is not a safetensors file")
            header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, Any])
            room = len(content) - 8 - length
    # mmap refuses an empty file with ValueError, msgspec derives from it
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(
            f"{path.parent.name}/{path.name} is not a safetensors file ({error})"
        ) from error
    header.pop("__metadata__", None)
    try:
        entries = msgspec.convert(header, dict[str, HeaderEntry])
    except msgspec.ValidationError as error:
        raise CheckpointInvalid(
            f"{path.parent.name}/{path.name} has a broken header ({error})"
        ) from error
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= room or end - begin != ITEM_BYTES.get(
            entry.dtype, 0
        ) * math.prod(entry.shape):
            raise CheckpointInvalid(
                f"{path.parent.name}/{path.name}: {name} does not fit in the file"
            )
    return entries, 8 + length
