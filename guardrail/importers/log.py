"""A recorded run in memory: one number a signal and record, eight bytes each."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guardrail.records import Observation

# From this share of records that repeat the step of the one before, the "step" is an epoch or the like.
REPEATING = 0.3
LARGEST_STEP = 2**62


class Column:
    """The values of one signal. A cell that was not logged is no NaN: NaN is news."""

    __slots__ = ("missing", "present", "values")

    def __init__(self, rows: int = 0) -> None:
        """A column that begins with `rows` cells that were not logged."""
        self.values = array("d", bytes(8 * rows))
        self.present = bytearray(rows)  # 1: logged
        self.missing = rows

    def __len__(self) -> int:
        return len(self.values)

    def append(self, value: float | None) -> None:
        self.present.append(value is not None)
        self.missing += value is None
        self.values.append(0.0 if value is None else value)

    def fill(self, row: int, value: float) -> None:
        """Give a missing cell its value."""
        self.missing -= 1
        self.present[row] = 1
        self.values[row] = value

    def get(self, row: int) -> float | None:
        return self.values[row] if self.present[row] else None


@dataclass(slots=True)
class Log:
    """One recorded run.

    Attributes:
        path: of the file or folder, as a person would name it; "FILE#RUN" where one file holds several runs.
        format: "csv", "tensorboard", ...
        steps: of each record, in file order.
        columns: signal -> its values, as long as `steps`.
        names: signal -> what the file calls it.
        notes: one line each about what could not be read.
        folder: of a run directory of guardrail itself.
    """

    path: str
    format: str
    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, Column] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, cells: Mapping[str, float]) -> None:
        """Append a record; signals may be new.

        A record of the same step that tells other signals than the one before tells them of that step: loggers that
        write training and validation, or loss and norm, on rows of their own are common. It stays a record, an empty
        one, so that records count as they do in the file.
        """
        rows = len(self.steps)
        self.steps.append(step)
        columns = self.columns
        for signal in cells:
            if signal not in columns:
                columns[signal] = Column(rows)
        if rows and cells and self.steps[rows - 1] == step:
            owner = self._owner(rows - 1, step)
            if owner is not None and not any(columns[signal].present[owner] for signal in cells):
                for signal, value in cells.items():
                    columns[signal].fill(owner, value)
                cells = {}
        for signal, column in columns.items():
            column.append(cells.get(signal))

    def _owner(self, row: int, step: int) -> int | None:
        """The last record of this step that holds anything, from `row` backwards."""
        while row >= 0 and self.steps[row] == step:
            if any(column.present[row] for column in self.columns.values()):
                return row
            row -= 1
        return None

    def finish(self) -> Log:
        """Call once when all is read. Counts the records where their step says nothing."""
        steps = self.steps
        told: Sequence[int] = range(len(steps))
        if all(column.missing for column in self.columns.values()):
            present = [column.present for column in self.columns.values()]
            told = [row for row in told if any(cells[row] for cells in present)]
        repeated = sum(steps[row] == steps[before] for before, row in itertools.pairwise(told))
        if repeated > REPEATING * max(8, len(told)):
            self.notes.append("most records repeat the step of the one before, so records are counted instead")
            self.steps = array("q", range(1, len(steps) + 1))
        return self

    def observations(self) -> Iterator[tuple[int, Observation]]:
        """(record, what the controller sees of it), in order; records without a watched signal are passed over.

        A record stands for one batch: its positions are its own number, since nothing says which data it was.
        """
        names = list(self.columns)
        columns = list(self.columns.values())
        if not columns:
            return  # a file whose only record with a signal has no step
        if not any(column.missing for column in columns):
            table = zip(*(column.values for column in columns), strict=True)
            signals = map(dict, map(zip, itertools.repeat(names), table))  # no line of Python a record
            for row, (step, cells) in enumerate(zip(self.steps, signals, strict=True)):
                yield row, Observation(step=step, first=row, last=row + 1, signals=cells)
            return
        for row, step in enumerate(self.steps):
            cells = {n: c.values[row] for n, c in zip(names, columns, strict=True) if c.present[row]}
            if cells:
                yield row, Observation(step=step, first=row, last=row + 1, signals=cells)


def number(text: str) -> float | None:
    """A cell as a number: "nan", "-inf", "1,234", "1e-3"; None for anything else, a blank one included."""
    try:
        return float(text)
    except ValueError:
        pass
    text = text.strip().strip("'\"").replace(",", "")
    try:
        return float(text)
    except ValueError:
        return None


def whole(value: float | None) -> int | None:
    """A step: a finite number without a fraction worth speaking of."""
    if value is None or not -LARGEST_STEP < value < LARGEST_STEP:
        return None
    return round(value)
