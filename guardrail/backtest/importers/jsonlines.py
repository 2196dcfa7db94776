"""JSON lines: one object per record, with the keys of nested objects joined by "/". Also one array
of such objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from guardrail.backtest.importers.base import Importer
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.names import (
    KINDS,
    Chooser,
    choose_signals,
    find_step_column,
    is_evaluation,
    normalize,
    rank_further,
    rank_signal,
    says_evaluation,
)
from guardrail.backtest.importers.recorded_log import COUNTED, Log, parse_number, parse_step
from guardrail.core.errors import DataError
from guardrail.core.format import format_plural
from guardrail.core.text import clean_text

SUMMARY = ("train runtime", "train loss", "total flos")  # in the last record of the Trainer
SAMPLE = 1000  # records that are read to learn the names
SHOWN = 40  # characters of a name or a value in a note
_decode = msgspec.json.Decoder().decode

Record = dict[str, Any]


class JsonLines(Importer):
    name = "jsonl"
    reads = "JSON lines"
    recognised_by = "a record that names a signal"

    def recognises(self, file: LogFile) -> bool:
        return file.is_json and (file.is_named or _names_a_signal(file.first_line))

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        with path.open("rb") as file:
            return [log_from_records(_read_records(file), shown, "jsonl", columns)]


def _names_a_signal(line: str) -> bool:
    try:
        record = decode_json(line.rstrip("\r\n, "))
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    return any(rank_signal(name) is not None for name in flatten(record))


def log_from_records(
    records: Iterable[Record | None], shown: str, kind: str, columns: Mapping[str, str]
) -> Log:
    """Return a log of flat records. Rows of an evaluation, and rows without a signal, are counted.

    Args:
        records: None stands for one that could not be read.
        shown: path in messages.
        kind: the format.
        columns: signal -> column that the user chose.

    Raises:
        DataError: no column is a signal, or no record has a step.
    """
    return _Builder(shown, kind, columns).build(iter(records))


class _Builder:
    """Makes a log of records. The first `SAMPLE` records show which columns there are."""

    def __init__(self, shown: str, kind: str, columns: Mapping[str, str]) -> None:
        self._log = Log(path=shown, format=kind)
        self._chooser = Chooser(columns)
        self._names: dict[str, None] = {}  # columns that hold numbers, in order
        self._unread = _UnreadValues()
        self._broken = 0  # records that cannot be read, or have no step
        self._count = 0  # records with a signal

    def build(self, records: Iterator[Record | None]) -> Log:
        sample = self._read_sample(records)
        step_column = _find_step_column(sample)
        log = self._log
        choose_signals(log, self._names, self._chooser)
        for record in sample:
            self._add(record, step_column)
        for later in records:
            if later is None:
                self._broken += 1
            else:
                self._add(later, step_column)
        if step_column is None:
            unusable = find_step_column(self._names)
            if unusable is not None:
                log.notes.append(COUNTED.format(clean_text(unusable, SHOWN)))
        log.notes += self._unread.notes(set(log.names.values()))
        if self._broken:
            log.notes.append(
                f"{format_plural(self._broken, 'record')} skipped: without a step, or cut off"
            )
        if not len(log):
            raise DataError(f"{log.path}: no record has a step", kind="no_step")
        return log.finish()

    def _read_sample(self, records: Iterator[Record | None]) -> list[Record]:
        """Return the first records, and learn the names of the columns from them."""
        sample: list[Record] = []
        for record in records:
            if record is None:
                self._broken += 1
                continue
            sample.append(record)
            if not _is_evaluation(record):
                for name, value in record.items():
                    if _as_number(value) is not None:
                        self._names[name] = None
                self._unread.note_texts(record)
            if len(sample) >= SAMPLE and self._chooser.choose(self._names):
                break
        return sample

    def _add(self, record: Record, step_column: str | None) -> None:
        if _is_evaluation(record):
            self._log.count_other_row("evaluation")
            return
        cells = self._cells(record)
        if not cells:
            _count_other_row(self._log, record)
            return
        self._count += 1
        step: int | None = self._count
        if step_column is not None:
            step = parse_step(record.get(step_column))
        if step is None:
            self._broken += 1
        else:
            self._log.add_record(step, cells)

    def _cells(self, record: Record) -> dict[str, float]:
        """Return signal -> value of a record."""
        cells = {}
        for signal, name in self._log.names.items():
            if name not in record:
                continue
            value = _as_number(record[name])
            if value is not None:
                cells[signal] = value
            else:
                self._unread.count(name, record[name])
        return cells


class _UnreadValues:
    """Counts the values of signals that are not numbers."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}  # column -> (number of values, an example)

    def note_texts(self, record: Mapping[str, Any]) -> None:
        """Remember columns that would be signals if they held numbers."""
        for name, value in record.items():
            if not isinstance(value, str) or not value or _as_number(value) is not None:
                continue
            if rank_signal(name) or rank_further(name):
                self._found.setdefault(name, (0, value))

    def count(self, name: str, value: Any) -> None:
        if value is None or value == "":
            return
        count, _ = self._found.get(name, (0, ""))
        self._found[name] = count + 1, str(value)

    def notes(self, read: set[str]) -> Iterator[str]:
        """Give one line per column.

        Args:
            read: columns that were read as signals.
        """
        for name, (count, example) in self._found.items():
            end = f"such as {clean_text(example, SHOWN)!r}: not read"
            if name not in read:
                yield f"{clean_text(name, SHOWN)}: holds no numbers, {end}"
            elif count == 1:
                yield f"{clean_text(name, SHOWN)}: 1 value is not a number, {end}"
            elif count:
                yield f"{clean_text(name, SHOWN)}: {count:,} values are not numbers, {end}"


def _find_step_column(records: Iterable[Record]) -> str | None:
    """Return the column that counts steps, of those that hold a step in at least one record."""
    names: dict[str, None] = {}
    for record in records:
        for name, value in record.items():
            if parse_step(value) is not None:
                names[name] = None
    found = find_step_column(names)
    if found is None and "_step" in names:
        return "_step"  # of wandb
    return found


def _is_evaluation(record: Record) -> bool:
    """Return whether a record says that it is one of an evaluation: {"split": "eval", ...}."""
    return any(kind in record and says_evaluation(record[kind]) for kind in KINDS)


def _count_other_row(log: Log, record: Record) -> None:
    if any(is_evaluation(name) for name in record):
        log.count_other_row("evaluation")
    elif any(normalize(name) in SUMMARY for name in record):
        log.count_other_row("summary")
    # A row of further signals belongs to a record.
    elif not any(rank_further(name) for name in record):
        log.count_other_row("other")


def flatten(record: Mapping[str, Any], prefix: str = "") -> Record:
    """Return {"train/loss": 1} for {"train": {"loss": 1}}."""
    found: Record = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found


def decode_json(line: bytes | str) -> Any:
    """Return JSON, also with the NaN and Infinity that Python writes. ValueError."""
    try:
        return _decode(line)
    except msgspec.DecodeError:
        return json.loads(line)


def _read_records(lines: Iterable[bytes]) -> Iterator[Record | None]:
    """Give each record of the lines; None for one that is no JSON object."""
    for line in lines:
        line = line.strip(b"\r\n\t \0,")
        if not line or line in (b"[", b"]"):
            continue
        try:
            decoded = decode_json(line)
            if not isinstance(decoded, list):
                decoded = [decoded]
            records = [_flat_record(value) for value in decoded]
        except (ValueError, RecursionError):
            yield None
            continue
        yield from records


def _flat_record(value: Any) -> Record | None:
    if not isinstance(value, dict):
        return None
    return flatten(value)


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return parse_number(value)
    if not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        if value > 0:
            return math.inf
        return -math.inf
