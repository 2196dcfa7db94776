""".wandb files, as wandb leaves them in wandb/offline-run-*: framed as a log of LevelDB, filled
with wandb's records.

The records are read with wandb's own protocol buffers, so wandb must be installed. Its reader of
the frames was Python once and is none any more (0.31); the frames are simple:

    file    7 bytes ":W&B", 0xBEE1, version; then blocks of 32 KiB, the first one shorter by these 7 bytes
    frame   CRC-32 of type and data, length, type (1 whole, 2 first, 3 middle, 4 last part of a record); data
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from guardrail.backtest.importers.jsonlines import flat, from_records, loads
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.errors import DataError

MAGIC = b":W&B"
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """DataError if wandb is not installed, or the file holds no history."""
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError as error:
        raise DataError(
            f"{shown}: a file of wandb, which is not installed here"
            "\n  hint: pip install 'guardrail[wandb]', or export the run as CSV"
        ) from error

    def records() -> Iterator[dict[str, Any] | None]:
        with path.open("rb") as file:
            for data in frames(file):
                if data is None:
                    yield None
                    continue
                try:
                    record = Record.FromString(data)
                except DecodeError:
                    yield None
                    continue
                if record.WhichOneof("record_type") == "history":
                    yield _history(record.history)

    return [from_records(records(), shown, "wandb", columns)]


def frames(file: BinaryIO) -> Iterator[bytes | None]:
    """The data of each record whose checksums hold; None, as the last, where the file is cut off or
    damaged.
    """
    at = len(file.read(_HEADER.size))
    record = b""
    while True:
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # too short for a frame: zeros
            file.read(left)
            at += left
            continue
        header = file.read(_HEADER.size)
        if not header:
            return
        if len(header) < _HEADER.size:
            yield None
            return
        checksum, length, kind = _HEADER.unpack(header)
        data = file.read(length)
        at += len(header) + length
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            yield None
            return
        record = data if kind in (_WHOLE, _FIRST) else record + data
        if kind in (_WHOLE, _LAST):
            yield record


def _history(history: Any) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    if history.HasField("step"):
        cells["_step"] = history.step.num
    for item in history.item:
        name = item.key or "/".join(item.nested_key)
        try:
            cells |= flat({name: loads(item.value_json)})
        except (ValueError, RecursionError):
            continue
    return cells
