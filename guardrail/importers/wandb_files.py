""".wandb files, as wandb leaves them in wandb/offline-run-*: read by wandb's own reader where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from guardrail.errors import DataError
from guardrail.importers.jsonlines import flat, from_records, loads
from guardrail.importers.log import Log

MAGIC = b":W&B"


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """DataError if wandb is not installed, or the file holds no history."""
    try:
        from wandb.proto.wandb_internal_pb2 import Record
        from wandb.sdk.internal.datastore import DataStore
    except ImportError as error:
        raise DataError(
            f"{shown}: a file of wandb, which is not installed here"
            "\n  hint: pip install wandb, or export the run as CSV"
        ) from error

    def records() -> Iterator[dict[str, Any] | None]:
        store = DataStore()
        store.open_for_scan(str(path))
        while True:
            try:
                data = store.scan_data()
            except (AssertionError, OSError, ValueError):  # how it says that a block is torn
                yield None
                return
            if data is None:
                return
            record = Record()
            try:
                record.ParseFromString(data)
            except Exception as error:  # protobuf's DecodeError has another home in each of its implementations
                if type(error).__name__ != "DecodeError":
                    raise
                yield None
                continue
            if record.WhichOneof("record_type") == "history":
                yield _history(record.history)

    return [from_records(records(), shown, "wandb", columns)]


def _history(history: Any) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    if history.HasField("step"):
        cells["_step"] = history.step.num
    for item in history.item:
        name = item.key or "/".join(item.nested_key)
        try:
            cells[name] = loads(item.value_json)
        except ValueError:
            continue
    return flat(cells)
