"""JSON lines: one object a record, nested ones with their keys joined by "/"; also one array of such objects."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from guardrail.errors import DataError
from guardrail.importers.log import Log, number, whole
from guardrail.importers.names import Chooser, step_name

SAMPLE = 1000  # records that are looked at to learn the names
_decode = msgspec.json.Decoder().decode


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """DataError if no record holds a signal."""
    with path.open("rb") as file:
        return [from_records(_records(file), shown, "jsonl", columns)]


def from_records(
    records: Iterable[dict[str, Any] | None],
    shown: str,
    kind: str,
    columns: Mapping[str, str],
    *,
    empty: bool = True,
) -> Log:
    """A log of flat records.

    Args:
        records: None stands for one that could not be read.
        empty: records without a signal count as well.
    """
    log = Log(path=shown, format=kind)
    waiting: list[dict[str, Any]] = []
    iterator = iter(records)
    names: dict[str, None] = {}
    broken = 0
    for record in iterator:
        if record is None:
            broken += 1
            continue
        waiting.append(record)
        names.update(dict.fromkeys(name for name, value in record.items() if _value(value) is not None))
        if len(waiting) >= SAMPLE and Chooser(columns).choose(names):
            break
    log.names = Chooser(columns).choose_or_refuse(names, shown)
    at_step = step_name(names) or ("_step" if "_step" in names else None)
    wanted = list(log.names.items())
    count = 0
    for source in (waiting, iterator):
        for record in source:
            if record is None:
                broken += 1
                continue
            cells = {}
            for signal, name in wanted:
                if name in record and (value := _value(record[name])) is not None:
                    cells[signal] = value
            if not cells and not empty:
                continue
            count += 1
            step = count if at_step is None else whole(_value(record.get(at_step)))
            if step is None:
                broken += 1
            else:
                log.add(step, cells)
    if broken:
        log.notes.append(f"{broken} record{'s' if broken > 1 else ''} without a step or cut off left out")
    if not len(log):
        raise DataError(f"{shown}: no record has a step")
    return log.finish()


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"loss": 1}} -> {"train/loss": 1}."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found


def loads(line: bytes | str) -> Any:
    """JSON, with the NaN and Infinity that Python writes. ValueError."""
    try:
        return _decode(line)
    except msgspec.DecodeError:
        return json.loads(line)


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    for line in lines:
        line = line.strip(b"\r\n\t \0,")
        if not line or line in (b"[", b"]"):
            continue
        try:
            record = loads(line)
            several = record if isinstance(record, list) else [record]
            records = [flat(one) if isinstance(one, dict) else None for one in several]
        except (ValueError, RecursionError):
            yield None
            continue
        yield from records


def _value(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:  # a whole number of hundreds of digits
            return math.inf if value > 0 else -math.inf
    return number(value) if isinstance(value, str) else None
