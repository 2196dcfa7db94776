"""JSON lines: one object a record, nested ones with their keys joined by "/"; also one array of
such objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from guardrail.backtest.importers.names import (
    KINDS,
    Chooser,
    describe,
    further,
    is_evaluation,
    plain_name,
    rank,
    says_evaluation,
    step_name,
)
from guardrail.backtest.importers.recorded_log import COUNTED, Log, number, step_number
from guardrail.core.errors import DataError
from guardrail.core.text import clean_text

SUMMARY = ("train runtime", "train loss", "total flos")  # what the Trainer says at the end
SAMPLE = 1000  # records that are looked at to learn the names
_decode = msgspec.json.Decoder().decode


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """DataError if no record holds a signal."""
    with path.open("rb") as file:
        return [from_records(_records(file), shown, "jsonl", columns)]


def from_records(
    records: Iterable[dict[str, Any] | None], shown: str, kind: str, columns: Mapping[str, str]
) -> Log:
    """A log of flat records. Rows of an evaluation, and rows without a signal, are counted apart.

    Args:
        records: None stands for one that could not be read.
    """
    log = Log(path=shown, format=kind)
    waiting: list[dict[str, Any]] = []
    iterator = iter(records)
    names: dict[str, None] = {}
    unread = _Unread()
    broken = 0
    for record in iterator:
        if record is None:
            broken += 1
            continue
        waiting.append(record)
        if not _is_evaluation(record):
            names.update(
                dict.fromkeys(name for name, value in record.items() if _value(value) is not None)
            )
            unread.look(record)
        if len(waiting) >= SAMPLE and Chooser(columns).choose(names):
            break
    at_step = _step_name(waiting)
    describe(log, names, Chooser(columns))
    wanted = list(log.names.items())
    count = 0
    for source in (waiting, iterator):
        for record in source:
            if record is None:
                broken += 1
                continue
            if _is_evaluation(record):
                log.set_apart("evaluation")
                continue
            cells = {}
            for signal, name in wanted:
                if name in record:
                    value = _value(record[name])
                    if value is not None:
                        cells[signal] = value
                    else:
                        unread.count(name, record[name])
            if not cells:
                _set_apart(log, record)
                continue
            count += 1
            step = count if at_step is None else step_number(record.get(at_step))
            if step is None:
                broken += 1
            else:
                log.add(step, cells)
    if at_step is None and (counter := step_name(names)) is not None:
        log.notes.append(COUNTED.format(clean_text(counter, 40)))
    log.notes += unread.notes(wanted)
    if broken:
        log.notes.append(
            f"{broken} record{'s' if broken > 1 else ''} without a step or cut off left out"
        )
    if not len(log):
        raise DataError(f"{shown}: no record has a step")
    return log.finish()


class _Unread:
    """Values of signals that are no numbers."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def look(self, record: Mapping[str, Any]) -> None:
        """Of the records that teach the names: columns that would be signals if they held
        numbers.
        """
        for name, value in record.items():
            if (
                isinstance(value, str)
                and value
                and _value(value) is None
                and (rank(name) or further(name))
            ):
                self._found.setdefault(name, (0, value))

    def count(self, name: str, value: Any) -> None:
        if value is not None and value != "":
            self._found[name] = self._found.get(name, (0, ""))[0] + 1, str(value)

    def notes(self, wanted: Iterable[tuple[str, str]]) -> Iterator[str]:
        read = {name for _, name in wanted}
        for name, (count, example) in self._found.items():
            shown = f"{clean_text(name, 40)}: {{}}, such as {clean_text(example, 40)!r}: not read"
            if name not in read:
                yield shown.format("holds no numbers")
            elif count:
                yield shown.format(f"{count:,} value{'s are' if count > 1 else ' is'} no number")


def _step_name(records: Iterable[Mapping[str, Any]]) -> str | None:
    """The column that counts steps, by what it holds in most records."""
    names: dict[str, None] = {}
    for record in records:
        names.update(
            dict.fromkeys(name for name, value in record.items() if step_number(value) is not None)
        )
    return step_name(names) or ("_step" if "_step" in names else None)


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record says so of itself: {"split": "eval", ...}."""
    return any(kind in record and says_evaluation(record[kind]) for kind in KINDS)


def _set_apart(log: Log, record: Mapping[str, Any]) -> None:
    if any(is_evaluation(name) for name in record):
        log.set_apart("evaluation")
    elif any(plain_name(name) in SUMMARY for name in record):
        log.set_apart("summary")
    # a row of signals that belong to a record, and are not judged
    elif not any(further(name) for name in record):
        log.set_apart("other")


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
        except OverflowError:  # an integer of more than 308 digits
            return math.inf if value > 0 else -math.inf
    return number(value) if isinstance(value, str) else None
