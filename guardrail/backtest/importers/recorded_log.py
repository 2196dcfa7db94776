"""A recorded run in memory: one number a signal and record, eight bytes each."""

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
from guardrail.core.records import Observation

# From this share of records that repeat the step of the one before, the "step" is an epoch or the
# like.
REPEATING = 0.3
LARGEST_STEP = 2**62
# Said of a column of steps such as "nan", "inf" or "1e30".
COUNTED = "{}: no value can be a step, so records are counted instead"
# What a number looks like where an object was printed: "tensor(1.03, device='cuda:0')",
# "np.float64(1.03)".
_WRAPPED = re.compile(r"(?:tensor|array|(?:np|numpy)\.float\d+|Decimal)\(\s*\[?['\s]*([^\s,\]')]+)")
# What the runtime library of Windows prints.
_WINDOWS = {
    "1.#qnan": math.nan,
    "1.#ind": math.nan,
    "1.#inf": math.inf,
    "1.#j": math.inf,
    "nan(ind)": math.nan,
}


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
        path: of the file or folder, as a person would name it; "FILE#RUN" where one file holds
        several runs.
        format: "csv", "tensorboard", ...
        steps: of each record, in file order.
        columns: signal -> its values, as long as `steps`.
        names: signal -> what the file calls it.
        beside: further signals that the file records and nothing judges -> what it calls them.
        policy: the column that shows that this is reinforcement learning, "" where none does.
        apart: rows that are no record of training: "evaluation", "summary", "other" -> how many.
        notes: one line each about what could not be read.
        folder: of a run directory of guardrail itself.
    """

    path: str
    format: str
    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, Column] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    policy: str = ""
    apart: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, cells: Mapping[str, float]) -> None:
        """Append a record; signals may be new. A row without a signal is no record.

        A row of the same step that holds other signals than the one before belongs to it: loggers
        that write loss and norm, or loss and reward, on rows of their own are common.
        """
        if not cells:
            return
        rows = len(self.steps)
        columns = self.columns
        for signal in cells:
            if signal not in columns:
                columns[signal] = Column(rows)
        if (
            rows
            and self.steps[-1] == step
            and not any(columns[signal].present[-1] for signal in cells)
        ):
            for signal, value in cells.items():
                columns[signal].fill(rows - 1, value)
            return
        self.steps.append(step)
        for signal, column in columns.items():
            column.append(cells.get(signal))

    def set_apart(self, kind: str) -> None:
        """Count a row that is no record of training."""
        self.apart[kind] = self.apart.get(kind, 0) + 1

    def finish(self) -> Log:
        """Call once when all is read. Counts the records where their step says nothing."""
        steps = self.steps
        repeated = sum(a == b for a, b in itertools.pairwise(steps))
        if repeated > REPEATING * max(8, len(steps)):
            self.notes.append(
                "most records repeat the step of the one before, so records are counted instead"
            )
            self.steps = array("q", range(1, len(steps) + 1))
        return self

    def observations(self) -> Iterator[tuple[int, Observation]]:
        """(record, what the controller sees of it), in order; records without a watched signal are
        passed over.

        A record stands for one batch: its positions are its own number, since nothing says which
        data it was.
        """
        names = list(self.columns)
        columns = list(self.columns.values())
        if not columns:
            return  # a file whose only record with a signal has no step
        if not any(column.missing for column in columns):
            table = zip(*(column.values for column in columns), strict=True)
            # no line of Python a record
            signals = map(dict, map(zip, itertools.repeat(names), table))
            for row, (step, cells) in enumerate(zip(self.steps, signals, strict=True)):
                yield row, Observation(step=step, first=row, last=row + 1, signals=cells)
            return
        for row, step in enumerate(self.steps):
            cells = {
                n: c.values[row] for n, c in zip(names, columns, strict=True) if c.present[row]
            }
            if cells:
                yield row, Observation(step=step, first=row, last=row + 1, signals=cells)


def settings_for(log: Log, settings: GuardOptions) -> GuardOptions:
    """The settings by which a log is judged: one of reinforcement learning has a signed loss,
    unless they say more.
    """
    return (
        msgspec.structs.replace(settings, loss="signed")
        if log.policy and settings.loss == "auto"
        else settings
    )


def number(text: str) -> float | None:
    """A cell as a number: "nan", "-inf", "1,234", "1e-3"; None for anything else, a blank one
    included.
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


def whole(value: float | None) -> int | None:
    """A step: a finite number without a fraction worth speaking of."""
    if value is None or not -LARGEST_STEP < value < LARGEST_STEP:
        return None
    return round(value)


def step_number(value: object) -> int | None:
    """A step as a log holds it: 12, "12", "12.0", "750/3690"."""
    if isinstance(value, str):
        return whole(number(value.partition("/")[0]))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return whole(float(value)) if abs(value) < LARGEST_STEP else None
