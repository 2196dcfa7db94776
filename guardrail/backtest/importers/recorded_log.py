"""A recorded run in memory: one number per signal and record, eight bytes each."""

from __future__ import annotations

import itertools
import math
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation

# If more than this share of the records repeat the step before them, the "step" is an epoch or
# something similar.
REPEATING = 0.3
LEAST_RECORDS = 8  # a shorter log counts as one of so many: a few repeats do not decide
LARGEST_STEP = 2**62
# The note about a column of steps such as "nan", "inf" or "1e30".
COUNTED = "{}: no value can be a step, so records are counted instead"
# A number inside of an object that was printed: "tensor(1.03, device='cuda:0')",
# "np.float64(1.03)".
_WRAPPED = re.compile(r"(?:tensor|array|(?:np|numpy)\.float\d+|Decimal)\(\s*\[?['\s]*([^\s,\]')]+)")
# How the runtime library of Windows prints them.
_WINDOWS = {
    "1.#qnan": math.nan,
    "1.#ind": math.nan,
    "1.#inf": math.inf,
    "1.#j": math.inf,
    "nan(ind)": math.nan,
}


class Column:
    """The values of one signal.

    A cell that was not logged is not a NaN. A NaN is a value that the program computed.
    """

    __slots__ = ("missing", "present", "values")

    def __init__(self, rows: int = 0) -> None:
        """Begin with `rows` cells that were not logged."""
        self.values = array("d", bytes(8 * rows))
        self.present = bytearray(rows)  # 1: logged
        self.missing = rows

    def __len__(self) -> int:
        return len(self.values)

    def append(self, value: float | None) -> None:
        """Add the cell of the next record; None: not logged."""
        self.present.append(value is not None)
        self.missing += value is None
        if value is None:
            value = 0.0
        self.values.append(value)

    def fill(self, row: int, value: float) -> None:
        """Give a cell that was not logged its value."""
        self.missing -= 1
        self.present[row] = 1
        self.values[row] = value

    def get(self, row: int) -> float | None:
        """Return a value; None if it was not logged."""
        if not self.present[row]:
            return None
        return self.values[row]


@dataclass(slots=True)
class Log:
    """One recorded run.

    Attributes:
        path: of the file or folder, as the user named it; "FILE#RUN" if a file holds several runs.
        format: "csv", "tensorboard", ...
        steps: of each record, in file order.
        columns: signal -> its values, as long as `steps`.
        names: signal -> its column in the file.
        further: signal -> its column in the file, of signals that are recorded and not judged.
        policy_column: the column that shows that this is reinforcement learning, or "".
        other_rows: kind of row -> number of rows, of rows that are no training records. Kinds are
            "evaluation", "summary", "other".
        notes: one line each about what could not be read.
        folder: the run directory, if guardrail wrote the log.
    """

    path: str
    format: str
    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, Column] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    further: dict[str, str] = field(default_factory=dict)
    policy_column: str = ""
    other_rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def add_record(self, step: int, cells: Mapping[str, float]) -> None:
        """Append a record; its signals may be new. A row without a signal is no record.

        A row belongs to the record before it if both have the same step and different signals.
        Many loggers write loss and norm, or loss and reward, on separate rows.
        """
        if not cells:
            return
        rows = len(self.steps)
        for signal in cells:
            if signal not in self.columns:
                self.columns[signal] = Column(rows)
        if rows and self.steps[-1] == step:
            if not any(self.columns[signal].present[-1] for signal in cells):
                for signal, value in cells.items():
                    self.columns[signal].fill(rows - 1, value)
                return
        self.steps.append(step)
        for signal, column in self.columns.items():
            column.append(cells.get(signal))

    def count_other_row(self, kind: str) -> None:
        """Count a row that is no training record."""
        self.other_rows[kind] = self.other_rows.get(kind, 0) + 1

    def finish(self) -> Log:
        """Return the log, complete. Numbers the records if their steps mostly repeat."""
        steps = self.steps
        repeated = sum(a == b for a, b in itertools.pairwise(steps))
        if repeated > REPEATING * max(LEAST_RECORDS, len(steps)):
            self.notes.append(
                "most records repeat the step of the one before, so records are counted instead"
            )
            self.steps = array("q", range(1, len(steps) + 1))
        return self

    def observations(self) -> Iterator[tuple[int, Observation]]:
        """Give (record, what the controller sees of it) in order.

        Records without a watched signal are skipped. A record stands for one batch. Its own number
        is its position, because a log does not say which data the batch was.
        """
        names = list(self.columns)
        columns = list(self.columns.values())
        if not columns:
            return  # the only record with a signal has no step
        if not any(column.missing for column in columns):
            table = zip(*(column.values for column in columns), strict=True)
            # `map` builds the dictionaries without a line of Python per record.
            signals = map(dict, map(zip, itertools.repeat(names), table))
            for row, (step, cells) in enumerate(zip(self.steps, signals, strict=True)):
                yield row, Observation(step=step, first=row, last=row + 1, signals=cells)
            return
        for row, step in enumerate(self.steps):
            cells = {}
            for name, column in zip(names, columns, strict=True):
                if column.present[row]:
                    cells[name] = column.values[row]
            if cells:
                yield row, Observation(step=step, first=row, last=row + 1, signals=cells)


def options_for_log(log: Log, options: GuardOptions) -> GuardOptions:
    """Return the options by which a log is judged.

    With `loss = "auto"`, a log of reinforcement learning has a signed loss.
    """
    if log.policy_column and options.loss == "auto":
        return msgspec.structs.replace(options, loss="signed")
    return options


def parse_number(text: str) -> float | None:
    """Return a cell as a number: "nan", "-inf", "1,234", "1e-3".

    None for anything else, also for a blank one.
    """
    try:
        return float(text)
    except ValueError:
        pass
    text = text.strip().strip("'\"")
    wrapped = _WRAPPED.match(text)
    if wrapped is not None:
        text = wrapped[1]
    found = _WINDOWS.get(text.lower().lstrip("+-"))
    if found is not None:
        return found
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def as_step(value: float | None) -> int | None:
    """Return a number as a step, rounded; None if no step is so large, or it is not finite."""
    if value is None or not -LARGEST_STEP < value < LARGEST_STEP:
        return None
    return round(value)


def parse_step(value: object) -> int | None:
    """Return a step as a log holds it: 12, "12", "12.0", "750/3690"."""
    if isinstance(value, str):
        return as_step(parse_number(value.partition("/")[0]))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not abs(value) < LARGEST_STEP:
        return None
    return as_step(float(value))
