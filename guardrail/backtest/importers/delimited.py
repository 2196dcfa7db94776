"""CSV, TSV and semicolons, with a header: exports of all kinds, Lightning's CSVLogger, tables
exported from wandb.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from guardrail.backtest.importers.names import (
    KINDS,
    Chooser,
    describe,
    is_evaluation,
    plain_name,
    says_evaluation,
    step_name,
)
from guardrail.backtest.importers.recorded_log import COUNTED, Log, number, step_number
from guardrail.core.errors import DataError
from guardrail.core.text import clean_text

DELIMITERS = ",\t;"
# wandb exports "RUN - NAME", "RUN - NAME__MIN" and "RUN - NAME__MAX" beside a column "Step".
_WANDB = re.compile(r"(?P<run>.+) - (?P<name>.+?)(?P<bound>__MIN|__MAX)?")
# "iter 12: loss 10.2301, time 250.11ms" is no header.
_TELLS = re.compile(r"[:=]\s*[-+]?(\d|nan|inf)|\s[-+]?\d+\.\d", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|[-+]?(nan|inf)|", re.IGNORECASE)

csv.field_size_limit(2**24)


def header(line: str) -> tuple[str, list[str]] | None:
    """(delimiter, names) if a file that begins with this line is a table with a header."""
    line = line.strip("\r\n")
    delimiter = max(DELIMITERS, key=line.count)
    if delimiter not in line:
        return None
    try:
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:
        return None
    words = [name for name in names if name and not _NUMBER.fullmatch(name)]
    unlike = any(
        len(name) > 200 or "{" in name or "|" in name or _TELLS.search(name) for name in names
    )
    return (
        (delimiter, names)
        if len(words) >= 1 and len(words) >= len(names) - 1 and not unlike
        else None
    )


def is_table(text: str) -> bool:
    """Whether the line behind the header has as many fields as it: many a log begins with words and
    commas.
    """
    first, _, rest = text.partition("\n")
    found = header(first)
    return found is not None and rest.split("\n", 1)[0].count(found[0]) == len(found[1]) - 1


def read(path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
    """One log, or one for each run of a wandb export. DataError if no column is a signal, or no
    record is whole.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        found = header(file.readline())
        if found is None:
            raise DataError(f"{shown}: the first line names no columns")
        delimiter, names = found
        rows = csv.reader(_without_nul(file), delimiter=delimiter)
        at_step = step_name(names)
        step_at = names.index(at_step) if at_step is not None else None
        groups = _wandb_runs(names)
        if groups is None:
            log = Log(path=shown, format="csv")
            describe(log, names, Chooser(columns))
            return [
                _fill(
                    log,
                    rows,
                    step_at,
                    {signal: names.index(name) for signal, name in log.names.items()},
                    names,
                )
            ]
        kept = [row for row in rows if row]
    logs = []
    for run, columns_of in groups.items():
        inside = Chooser(columns).choose(columns_of)
        if inside:
            picked = {signal: columns_of[name] for signal, name in inside.items()}
            told = [
                row for row in kept if any(_cell(row, at) is not None for at in picked.values())
            ]
            log = Log(path=f"{shown}#{clean_text(run, 80)}", format="wandb csv")
            describe(log, columns_of, Chooser(columns))
            log.names = {signal: names[at] for signal, at in picked.items()}
            logs.append(_fill(log, iter(told), step_at, picked, names))
    if not logs:
        Chooser(columns).choose_or_refuse(names, shown)
    return logs


def _wandb_runs(names: list[str]) -> dict[str, dict[str, int]] | None:
    """run -> name -> column, if this is a table that wandb exported."""
    groups: dict[str, dict[str, int]] = {}
    for at, name in enumerate(names):
        match = _WANDB.fullmatch(name)
        if match and not match["bound"] and f"{name}__MIN" in names:
            groups.setdefault(match["run"], {})[match["name"]] = at
    return groups or None


def _fill(
    log: Log,
    rows: Iterator[list[str]],
    step_at: int | None,
    chosen: dict[str, int],
    names: list[str],
) -> Log:
    evaluations = [at for at, name in enumerate(names) if is_evaluation(name)]
    kinds = [at for at, name in enumerate(names) if plain_name(name) in KINDS]
    width = max([*chosen.values(), step_at if step_at is not None else 0]) + 1
    wanted = list(chosen.items())
    broken, count = 0, 0
    unread: dict[str, int] = {}
    stepless: list[dict[str, float]] = []  # the records before the first one with a step
    try:
        for row in rows:
            if len(row) < width:
                broken += bool(row)
                continue
            if any(at < len(row) and says_evaluation(row[at]) for at in kinds):
                log.set_apart("evaluation")
                continue
            cells = {}
            for signal, at in wanted:
                value = number(row[at])
                if value is not None:
                    cells[signal] = value
                elif row[at].strip():
                    unread[signal] = unread.get(signal, 0) + 1
            count += bool(cells)
            step = step_number(row[step_at]) if step_at is not None else count
            if step is None:
                broken += 1
                if cells and not len(log):
                    stepless.append(cells)
            elif cells:
                log.add(step, cells)
            else:
                told = any(at < len(row) and row[at] for at in evaluations)
                log.set_apart("evaluation" if told else "other")
    except csv.Error as error:
        log.notes.append(f"stopped after {len(log)} records: {error}")
    if stepless and not len(log) and step_at is not None:
        broken -= len(stepless)
        log.notes.append(COUNTED.format(clean_text(names[step_at], 40)))
        for step, cells in enumerate(stepless, 1):
            log.add(step, cells)
    for signal, cells_unread in unread.items():
        shown = clean_text(log.names[signal], 40)
        log.notes.append(
            f"{shown}: {cells_unread:,} value{'s are' if cells_unread > 1 else ' is'} no number: not read"
        )
    if broken:
        log.notes.append(
            f"{broken} line{'s' if broken > 1 else ''} without a step or with too few fields left out"
        )
    if not any(column.missing < len(column) for column in log.columns.values()):
        raise DataError(f"{log.path}: the columns {', '.join(log.names.values())} hold no number")
    return log.finish()


def _cell(row: list[str], at: int) -> float | None:
    return number(row[at]) if at < len(row) else None


def _without_nul(lines: Iterator[str]) -> Iterator[str]:
    """A crash of the machine leaves zeros at the end of a file; csv refuses them."""
    for line in lines:
        yield line.replace("\0", "") if "\0" in line else line
