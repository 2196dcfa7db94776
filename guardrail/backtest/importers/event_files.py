"""TensorBoard's event files, through its own loader: scalars of the first format and tensors of the
second.

What a restarted writer purged is read all the same: that is the stretch in which something went
wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from guardrail.backtest.importers.names import Chooser, describe, further, rank
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.packages import require_package


class Point(NamedTuple):
    step: int
    time: float
    value: float


# float32 and float64 numbers, by TensorBoard's number of the type.
_FORMATS = {1: "<f", 2: "<d"}


def is_event_file(head: bytes) -> bool:
    """Each begins with a record that names the version of the format."""
    return b"brain.Event:" in head[:64]


def read(paths: Sequence[Path], shown: str, columns: Mapping[str, str]) -> list[Log]:
    """All event files of one folder are one run. DataError if they hold no signal."""
    tags: dict[str, list[Point]] = {}  # those that mean nothing here stay empty
    notes: list[str] = []
    for path in sorted(paths):
        for tag, point in _points(path, notes):
            kept = tags.get(tag)
            if kept is None:
                kept = tags[tag] = []
            if (
                tag in columns.values()
                or rank(tag) is not None
                or (columns and further(tag) is not None)
            ):
                kept.append(point)
    log = Log(path=shown, format="tensorboard", notes=notes)
    describe(log, tags, Chooser(columns))
    for step, cells in merged({signal: tags[tag] for signal, tag in log.names.items()}):
        log.add(step, cells)
    return [log.finish()]


def _points(path: Path, notes: list[str]) -> Iterator[tuple[str, Point]]:
    require_package("tensorboard", path.name)
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    whole = 0
    event = Event()
    try:
        for data in RawEventFileLoader(str(path)).Load():
            event.ParseFromString(data)
            whole += len(data) + 16  # length, two checksums
            for value in event.summary.value:
                if (scalar := _scalar(value)) is not None:
                    yield value.tag, Point(event.step, event.wall_time, scalar)
    except DecodeError:
        notes.append(f"{path.name}: holds a record that is no event; what follows it is left out")
        return
    rest = path.stat().st_size - whole
    if rest:
        notes.append(f"{path.name}: the last {rest:,} bytes are cut off or damaged")


def _scalar(value: Any) -> float | None:
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


def merged(signals: Mapping[str, Sequence[Point]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Several tags as one table, by step. Where the steps of a tag go back, another stretch begins.

    A stretch of one tag belongs to that stretch of the longest tag during which it began, so that a
    tag which was written seldom is not put into the wrong one.
    """
    longest = max(signals.values(), key=len)
    stretches = _stretches(longest)
    begins = [stretch[0].time for stretch in stretches]
    tables: list[dict[int, dict[str, float]]] = [{} for _ in stretches]
    for signal, points in signals.items():
        parts = _stretches(points)
        for number, part in enumerate(parts):
            if len(parts) == len(stretches):
                table = tables[number]
            else:
                table = tables[max(0, sum(begin <= part[0].time for begin in begins) - 1)]
            for point in part:
                cells = table.setdefault(point.step, {})
                # a NaN stays, also if the step is told again
                if math.isfinite(cells.get(signal, 0.0)):
                    cells[signal] = point.value
    for table in tables:
        yield from sorted(table.items())


def _stretches(points: Iterable[Point]) -> list[list[Point]]:
    points = list(points)
    cuts = [
        0,
        *(at + 1 for at, (a, b) in enumerate(pairwise(points)) if b.step < a.step),
        len(points),
    ]
    return [points[first:last] for first, last in pairwise(cuts)]
