""".wandb files, as wandb writes them in wandb/offline-run-*.

A file has the frames of a LevelDB log. They hold records of wandb's own protocol buffers, so wandb
must be installed. Without it, export the run as CSV. wandb had a reader of the frames in Python;
version 0.31 has none any more. The format of the frames:

    file    7 bytes ":W&B", 0xBEE1, version; then blocks of 32 KiB, the first one shorter by these 7 bytes
    frame   CRC-32 of type and data, length, type (1 complete, 2 first, 3 middle, 4 last part of a record); data
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from guardrail.backtest.importers.base import Importer
from guardrail.backtest.importers.jsonlines import decode_json, flatten, log_from_records
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.recorded_log import Log

MAGIC = b":W&B"
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
_COMPLETE, _FIRST, _LAST = 1, 2, 4


class WandbFiles(Importer):
    name = "wandb"
    reads = "`.wandb` files"
    recognised_by = "file header"
    package = "wandb"

    def recognises(self, file: LogFile) -> bool:
        return file.head.startswith(MAGIC)

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        return [log_from_records(_read_records(path), shown, "wandb", columns)]


def _read_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Give the records of the history; None for one that cannot be read."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    with path.open("rb") as file:
        for data in read_frames(file):
            if data is None:
                yield None
                continue
            try:
                record = Record.FromString(data)
            except DecodeError:
                yield None
                continue
            if record.WhichOneof("record_type") == "history":
                yield _flatten_history(record.history)


def read_frames(file: BinaryIO) -> Iterator[bytes | None]:
    """Give the data of each record whose checksums are right.

    The last one is None if the file is cut off or damaged.
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
        if kind in (_COMPLETE, _FIRST):
            record = b""
        record += data
        if kind in (_COMPLETE, _LAST):
            yield record


def _flatten_history(history: Any) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    if history.HasField("step"):
        cells["_step"] = history.step.num
    for item in history.item:
        name = item.key or "/".join(item.nested_key)
        try:
            cells |= flatten({name: decode_json(item.value_json)})
        except (ValueError, RecursionError):
            continue
    return cells
