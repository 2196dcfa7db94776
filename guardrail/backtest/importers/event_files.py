"""TensorBoard's event files, read by its own loader: scalars of the first format and tensors of the
second.

Points that a restarted writer purged are read too: they are the steps in which something failed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from guardrail.backtest.importers.base import Importer, Scope
from guardrail.backtest.importers.log_file import LogFile
from guardrail.backtest.importers.names import Chooser, choose_signals, rank_further, rank_signal
from guardrail.backtest.importers.recorded_log import Log

_RECORD_BYTES = 16  # of a record beside its data: its length and two checksums
# TensorBoard's number of a type -> its format: float32, float64.
_FORMATS = {1: "<f", 2: "<d"}


class Point(NamedTuple):
    step: int
    time: float
    value: float


class EventFiles(Importer):
    name = "tensorboard"
    reads = "TensorBoard event files"
    recognised_by = "file header"
    package = "tensorboard"
    scope = Scope.FOLDER

    def recognises(self, file: LogFile) -> bool:
        """Each begins with a record that names the version of the format."""
        return b"brain.Event:" in file.head[:64]

    def read(self, path: Path, shown: str, columns: Mapping[str, str]) -> list[Log]:
        return self.read_together([path], shown, columns)

    def read_together(
        self, paths: Sequence[Path], shown: str, columns: Mapping[str, str]
    ) -> list[Log]:
        tags: dict[str, list[Point]] = {}  # tags that are no signal stay empty
        notes: list[str] = []
        for path in sorted(paths):
            for tag, point in _read_points(path, notes):
                points = tags.setdefault(tag, [])
                if _is_wanted(tag, columns):
                    points.append(point)
        log = Log(path=shown, format="tensorboard", notes=notes)
        choose_signals(log, tags, Chooser(columns))
        for step, cells in merge_by_step({name: tags[tag] for name, tag in log.names.items()}):
            log.add_record(step, cells)
        return [log.finish()]


def _is_wanted(tag: str, columns: Mapping[str, str]) -> bool:
    """Return whether a tag may be a signal; of the others no point is kept."""
    if tag in columns.values() or rank_signal(tag) is not None:
        return True
    return bool(columns) and rank_further(tag) is not None


def _read_points(path: Path, notes: list[str]) -> Iterator[tuple[str, Point]]:
    """Give (tag, point) of each scalar. Adds a note if the file is damaged."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    size_read = 0
    event = Event()
    try:
        for data in RawEventFileLoader(str(path)).Load():
            event.ParseFromString(data)
            size_read += len(data) + _RECORD_BYTES
            for value in event.summary.value:
                scalar = _as_scalar(value)
                if scalar is not None:
                    yield value.tag, Point(event.step, event.wall_time, scalar)
    except DecodeError:
        notes.append(f"{path.name}: one record is not an event; the rest of the file is not read")
        return
    rest = path.stat().st_size - size_read
    if rest:
        notes.append(f"{path.name}: the last {rest:,} bytes are cut off or damaged")


def _as_scalar(value: Any) -> float | None:
    """Return the number of a summary value; None if it is not one number."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor" or any(dim.size != 1 for dim in value.tensor.tensor_shape.dim):
        return None
    tensor = value.tensor
    for numbers in (tensor.float_val, tensor.double_val):
        if len(numbers) == 1:
            return float(numbers[0])
    form = _FORMATS.get(tensor.dtype)
    if form is not None and len(tensor.tensor_content) == struct.calcsize(form):
        return float(struct.unpack(form, tensor.tensor_content)[0])
    return None


def merge_by_step(
    signals: Mapping[str, Sequence[Point]],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Give (step, values) of several tags as one table.

    A new segment begins where the steps of a tag go back, as after a resume. A segment of one tag
    belongs to that segment of the longest tag during which it began. So a tag that was written
    rarely is not put into the wrong one.
    """
    longest = max(signals.values(), key=len)
    segments = _split_where_steps_go_back(longest)
    begins = [segment[0].time for segment in segments]
    tables: list[dict[int, dict[str, float]]] = [{} for _ in segments]
    for signal, points in signals.items():
        parts = _split_where_steps_go_back(points)
        for number, part in enumerate(parts):
            if len(parts) != len(segments):
                number = max(0, sum(begin <= part[0].time for begin in begins) - 1)
            for point in part:
                cells = tables[number].setdefault(point.step, {})
                # A NaN stays, also if the step was written again.
                if math.isfinite(cells.get(signal, 0.0)):
                    cells[signal] = point.value
    for table in tables:
        yield from sorted(table.items())


def _split_where_steps_go_back(points: Sequence[Point]) -> list[list[Point]]:
    cuts = [0]
    for index, (one, following) in enumerate(pairwise(points)):
        if following.step < one.step:
            cuts.append(index + 1)
    cuts.append(len(points))
    return [list(points[first:last]) for first, last in pairwise(cuts)]
