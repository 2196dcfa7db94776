"""CSV, TSV and semicolons, with a header: exports of all kinds, Lightning's CSVLogger, tables
exported from wandb.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from guardrail.backtest.importers.base import Importer
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.names import (
    KINDS,
    Chooser,
    choose_signals,
    find_step_column,
    is_evaluation,
    normalize,
    rank_signal,
    says_evaluation,
)
from guardrail.backtest.importers.recorded_log import COUNTED, Log, parse_number, parse_step
from guardrail.backtest.importers.text_logs import is_training_line
from guardrail.core.errors import DataError
from guardrail.core.format import format_plural
from guardrail.core.text import clean_text

DELIMITERS = ",\t;"
LONGEST_NAME = 200  # characters; a longer "name" is a line of text
# wandb exports "RUN - NAME", "RUN - NAME__MIN" and "RUN - NAME__MAX" beside a column "Step".
_WANDB = re.compile(r"(?P<run>.+) - (?P<name>.+?)(?P<bound>__MIN|__MAX)?")
# "iter 12: loss 10.2301, time 250.11ms" is no header: it holds values.
_VALUE = re.compile(r"[:=]\s*[-+]?(\d|nan|inf)|\s[-+]?\d+\.\d", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|[-+]?(nan|inf)|", re.IGNORECASE)

csv.field_size_limit(2**24)


class Tables(Importer):
    name = "csv"
    reads = "CSV and TSV files"
    recognised_by = "a header line that names a signal"

    def recognises(self, file: LogFile) -> bool:
        if not file.is_plain_text:
            return False
        header = parse_header(file.first_line)
        # "iter 0: loss nan, time 3ms" has commas too.
        if header is None or is_training_line(file.first_line):
            return False
        _, names = header
        if any(rank_signal(name.rsplit(" - ", 1)[-1]) is not None for name in names):
            return True
        return file.is_named and _has_table_row(file.text)

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        """Return one log, or one per run of a table that wandb exported."""
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = parse_header(file.readline())
            if header is None:
                raise DataError(f"{shown}: the first line names no columns", kind="no_columns")
            delimiter, names = header
            rows = csv.reader(_without_zeros(file), delimiter=delimiter)
            runs = _find_wandb_runs(names)
            if not runs:
                log = Log(path=shown, format="csv")
                choose_signals(log, names, Chooser(columns))
                chosen = {signal: names.index(name) for signal, name in log.names.items()}
                return [_Table(names, chosen).fill(log, rows)]
            kept = [row for row in rows if row]
        return _read_wandb_runs(runs, names, kept, shown, columns)


def parse_header(line: str) -> tuple[str, list[str]] | None:
    """Return (delimiter, names) if a file that begins with this line is a table with a header."""
    line = line.strip("\r\n")
    delimiter = max(DELIMITERS, key=line.count)
    if delimiter not in line:
        return None
    try:
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:
        return None
    words = [name for name in names if name and not _NUMBER.fullmatch(name)]
    # One column may have no name: pandas writes its index so.
    if not words or len(words) < len(names) - 1:
        return None
    if any(_is_no_name(name) for name in names):
        return None
    return delimiter, names


def _is_no_name(name: str) -> bool:
    return len(name) > LONGEST_NAME or "{" in name or "|" in name or bool(_VALUE.search(name))


def _has_table_row(text: str) -> bool:
    """Return whether the line after the header has as many fields as it.

    Many logs begin with words and commas.
    """
    first, _, rest = text.partition("\n")
    header = parse_header(first)
    if header is None:
        return False
    delimiter, names = header
    return rest.split("\n", 1)[0].count(delimiter) == len(names) - 1


def _find_wandb_runs(names: list[str]) -> dict[str, dict[str, int]]:
    """Return run -> name -> column, if this is a table that wandb exported; else nothing."""
    runs: dict[str, dict[str, int]] = {}
    for column, name in enumerate(names):
        match = _WANDB.fullmatch(name)
        if match and not match["bound"] and f"{name}__MIN" in names:
            runs.setdefault(match["run"], {})[match["name"]] = column
    return runs


def _read_wandb_runs(
    runs: dict[str, dict[str, int]],
    names: list[str],
    rows: list[list[str]],
    shown: str,
    columns: Mapping[str, str],
) -> list[Log]:
    chooser = Chooser(columns)
    logs = []
    for run, columns_of in runs.items():
        signals = chooser.choose(columns_of)
        if not signals:
            continue
        chosen = {signal: columns_of[name] for signal, name in signals.items()}
        of_run = [row for row in rows if _has_number(row, chosen)]
        log = Log(path=f"{shown}#{clean_text(run, 80)}", format="wandb csv")
        choose_signals(log, columns_of, chooser)
        log.names = {signal: names[column] for signal, column in chosen.items()}
        logs.append(_Table(names, chosen).fill(log, iter(of_run)))
    if not logs:
        chooser.choose_or_refuse(names, shown)
    return logs


def _has_number(row: list[str], chosen: dict[str, int]) -> bool:
    for column in chosen.values():
        if column < len(row) and parse_number(row[column]) is not None:
            return True
    return False


class _Table:
    """Fills a log from the rows of a table.

    Args:
        names: of all columns.
        chosen: signal -> its column.
    """

    def __init__(self, names: list[str], chosen: dict[str, int]) -> None:
        self._names = names
        self._chosen = chosen
        self._evaluations = [i for i, name in enumerate(names) if is_evaluation(name)]
        self._kinds = [i for i, name in enumerate(names) if normalize(name) in KINDS]
        self._step_column: int | None = None
        step_name = find_step_column(names)
        if step_name is not None:
            self._step_column = names.index(step_name)
        self._width = max([*chosen.values(), self._step_column or 0]) + 1
        self._broken = 0  # rows with too few fields, or without a step
        self._count = 0  # rows with a signal
        self._unread: dict[str, int] = {}  # signal -> values that are not numbers
        self._stepless: list[dict[str, float]] = []  # records before the first one with a step

    def fill(self, log: Log, rows: Iterator[list[str]]) -> Log:
        """Add all rows. DataError if no signal has a number."""
        try:
            for row in rows:
                self._add(log, row)
        except csv.Error as error:
            log.notes.append(f"stopped after {len(log)} records: {error}")
        if self._stepless and not len(log) and self._step_column is not None:
            self._broken -= len(self._stepless)
            log.notes.append(COUNTED.format(clean_text(self._names[self._step_column], 40)))
            for step, cells in enumerate(self._stepless, 1):
                log.add_record(step, cells)
        self._note_unread(log)
        if not any(column.missing < len(column) for column in log.columns.values()):
            raise DataError(
                f"{log.path}: the columns {', '.join(log.names.values())} hold no number",
                kind="no_number",
            )
        return log.finish()

    def _add(self, log: Log, row: list[str]) -> None:
        if len(row) < self._width:
            self._broken += bool(row)
            return
        if any(column < len(row) and says_evaluation(row[column]) for column in self._kinds):
            log.count_other_row("evaluation")
            return
        cells = self._cells(row)
        self._count += bool(cells)
        step: int | None = self._count
        if self._step_column is not None:
            step = parse_step(row[self._step_column])
        if step is None:
            self._broken += 1
            if cells and not len(log):
                self._stepless.append(cells)
        elif cells:
            log.add_record(step, cells)
        elif any(column < len(row) and row[column] for column in self._evaluations):
            log.count_other_row("evaluation")
        else:
            log.count_other_row("other")

    def _cells(self, row: list[str]) -> dict[str, float]:
        """Return signal -> value of a row."""
        cells = {}
        for signal, column in self._chosen.items():
            value = parse_number(row[column])
            if value is not None:
                cells[signal] = value
            elif row[column].strip():
                self._unread[signal] = self._unread.get(signal, 0) + 1
        return cells

    def _note_unread(self, log: Log) -> None:
        for signal, count in self._unread.items():
            log.notes.append(
                f"{clean_text(log.names[signal], 40)}: {format_plural(count, 'cell')} without a number: not read"
            )
        if self._broken:
            log.notes.append(
                f"{format_plural(self._broken, 'line')} skipped: without a step, or with too few fields"
            )


def _without_zeros(lines: Iterator[str]) -> Iterator[str]:
    """Give lines without NUL. A crash of the machine leaves them at the end; csv refuses them."""
    for line in lines:
        yield line.replace("\0", "")
