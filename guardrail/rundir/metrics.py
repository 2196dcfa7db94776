"""metrics.bin: one fixed-size little-endian row per step; metrics.json names the columns.

A part of `guardrail.rundir.run_directory`: callers go through `RunDirectory.metrics_writer` and
`RunDirectory.metrics`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.errors import RunDirectoryError
from guardrail.core.files import FILE_MODE, open_file, read_file, refuse_special, replace_file
from guardrail.core.records.record import Record
from guardrail.core.records.signals import METRIC_COLUMNS
from guardrail.decide.timelines import TimelineIndex, valid_rows

if TYPE_CHECKING:
    import numpy as np


class Layout(Record, frozen=True, kw_only=True):
    """metrics.json. A run keeps its first columns, also when a newer version continues it."""

    version: int = 1
    dtype: str = "<f8"
    columns: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        return 8 * len(self.columns)


def read_layout(path: Path) -> Layout | None:
    """Return the layout of metrics.bin; None: no metrics were written yet."""
    try:
        layout = msgspec.json.decode(read_file(path), type=Layout)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunDirectoryError(
            f"{path}: does not name the columns of metrics.bin ({error})"
        ) from error
    if not layout.columns:
        raise RunDirectoryError(
            f"{path}: does not name the columns of metrics.bin (there are none)"
        )
    return layout


class MetricsWriter:
    """Appends rows. There is one writer: the holder of run.lock.

    Each row is one system call; it is flushed and not synced. A crash or a full disk can leave an
    incomplete row at the end. It is cut off when the file is opened and after a failed write. The
    OSError of a full disk reaches the caller. The next `append` then starts after the last complete
    row.

    Args:
        further: names of columns after the usual ones, for a new file.
    """

    def __init__(self, path: Path, layout_path: Path, *, further: Sequence[str] = ()) -> None:
        layout = read_layout(layout_path)
        if layout is None:
            layout = Layout(columns=(*METRIC_COLUMNS, *further))
            replace_file(layout_path, msgspec.json.encode(layout))
        self.columns = layout.columns
        self._pack = struct.Struct(f"<{len(self.columns)}d").pack
        self._row_bytes = layout.row_bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._path = path
        self._descriptor = os.open(path, flags, FILE_MODE)
        try:
            refuse_special(self._descriptor, path)
        except OSError:
            self.close()
            raise
        self._size = os.fstat(self._descriptor).st_size
        self._torn = self._size % self._row_bytes != 0
        if self._torn:
            self._cut()

    @property
    def rows(self) -> int:
        return self._size // self._row_bytes

    def append(self, row: dict[str, float]) -> None:
        """Write one row. Columns that `row` lacks are NaN; names without a column are ignored."""
        if self._torn:
            self._cut()
        data = self._pack(*[row.get(name, math.nan) for name in self.columns])
        try:
            written = os.write(self._descriptor, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._torn = True
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._size += written

    def amend(self, row: dict[str, float]) -> None:
        """Replace the last row by `row`, which holds more values."""
        if self._torn or not self._size:
            return
        data = self._pack(*[row.get(name, math.nan) for name in self.columns])
        # the descriptor of this writer can only append
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(descriptor, data, self._size - self._row_bytes)
        finally:
            os.close(descriptor)

    def _cut(self) -> None:
        self._size -= self._size % self._row_bytes
        os.ftruncate(self._descriptor, self._size)
        self._torn = False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsView:
    """The rows that were complete when the view was made. It does not grow with the file.

    Attributes:
        columns: names, in file order.
        array: float64 [rows, columns], mapped from the file and read on access.
    """

    def __init__(
        self, columns: Sequence[str], array: np.ndarray, timelines: Callable[[], TimelineIndex]
    ) -> None:
        self.columns = tuple(columns)
        self.array = array
        self._timelines = timelines

    def __len__(self) -> int:
        return len(self.array)

    def column(self, name: str) -> np.ndarray:
        """Return one column, float64 [rows]; all NaN if the run has no such column."""
        import numpy as np

        if name not in self.columns:
            return np.full(len(self.array), np.nan)
        return self.array[:, self.columns.index(name)]

    def sensible(self) -> MetricsView:
        """Return a view of the rows whose step and timeline are valid numbers.

        Returns this view if all rows are valid.
        """
        good = valid_rows(self.column("step"), self.column("timeline"))
        return self if good.all() else MetricsView(self.columns, self.array[good], self._timelines)

    def current(self, timelines: TimelineIndex | None = None) -> np.ndarray:
        """Return bool [rows]: True for rows of the present timeline.

        Rows that a rollback or a restart abandoned are False.

        Args:
            timelines: those of a `Follower`; None: the journal is read.
        """
        steps, numbers = self.column("step"), self.column("timeline")
        if timelines is None:
            timelines = self._timelines()
            timelines.add_rows(steps, numbers)
        return timelines.current(steps, numbers)


def read_metrics(
    path: Path,
    layout_path: Path,
    *,
    columns: Sequence[str] | None,
    timelines: Callable[[], TimelineIndex],
) -> MetricsView:
    """Return a view of the complete rows.

    Args:
        columns: the columns to copy, in this order; None: all columns are mapped without reading.
    """
    import numpy as np

    layout = read_layout(layout_path)
    names = layout.columns if layout else METRIC_COLUMNS
    array: np.ndarray = np.empty((0, len(names)))
    if layout:
        with contextlib.suppress(FileNotFoundError), open_file(path) as file:
            if rows := os.fstat(file.fileno()).st_size // layout.row_bytes:
                try:
                    array = np.memmap(file, dtype="<f8", mode="r", shape=(rows, len(names)))
                except ValueError as error:  # the file was cut after its size was read
                    raise RunDirectoryError(f"{path}: cannot be mapped ({error})") from error
    view = MetricsView(names, array, timelines)
    if columns is None:
        return view
    return _Picked(view, columns)


def read_rows(
    path: Path, layout_path: Path, first: int, end: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return (columns, rows [first, end) as float64 [rows, columns]).

    There are fewer rows if the file ends before `end`. The rows are read and not mapped: access to
    a mapped file that was cut ends the process with SIGBUS.
    """
    import numpy as np

    layout = read_layout(layout_path)
    if layout is None:
        return METRIC_COLUMNS, np.empty((0, len(METRIC_COLUMNS)))
    try:
        with open_file(path) as file:
            file.seek(first * layout.row_bytes)
            data = file.read(max(0, end - first) * layout.row_bytes)
    except FileNotFoundError:
        data = b""
    rows = len(data) // layout.row_bytes
    found = np.frombuffer(data, dtype="<f8", count=rows * len(layout.columns))
    return layout.columns, found.reshape(rows, len(layout.columns))


class _Picked(MetricsView):
    """Some columns of a view. `current()` uses step and timeline of the complete view."""

    def __init__(self, view: MetricsView, columns: Sequence[str]) -> None:
        import numpy as np

        picked = view.array[:, :0]
        if columns:
            picked = np.stack([view.column(name) for name in columns], axis=1)
        super().__init__(columns, picked, view._timelines)
        self._view = view

    def current(self, timelines: TimelineIndex | None = None) -> np.ndarray:
        return self._view.current(timelines)
