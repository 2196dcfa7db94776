"""TensorBoard's event files, written with its protocol buffers alone: records, scalars, texts,
marks of a restart.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from guardrail.core.files import FILE_MODE, read_file, write_all

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class Text(NamedTuple):
    """One text of a tag; `at` is its wall time in seconds."""

    tag: str
    markdown: str
    step: int
    at: float


class EventFile:
    """An event file of this process, made with the first record, whose name sorts behind all that
    are there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._size = 0

    @property
    def begun(self) -> bool:
        return self._path is not None

    def append(self, data: bytes) -> None:
        """All of `data`, or OSError and a file as before."""
        if self._path is not None and not self._path.exists():
            self.close()
        path = self._path or self._folder / self._name()
        data = data if self._path else _version() + data
        descriptor = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE
        )
        try:
            write_all(descriptor, data)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._size)
                if not self._size:
                    path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._path = path
        self._size += len(data)

    def others(self) -> list[int]:
        """Times in the names of the event files that are there."""
        names = (_NAME.match(name) for name in os.listdir(self._folder))
        return [int(match[1]) for match in names if match]

    def _name(self) -> str:
        last = max(self.others(), default=0)
        return f"events.out.tfevents.{max(int(time.time()), last + 1):010d}.guardrail.{os.getpid()}"

    def close(self) -> None:
        self._path = None
        self._size = 0


def restart(step: int) -> bytes:
    """Readers forget everything that was told so far from `step` on."""
    from tensorboard.compat.proto import event_pb2

    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return _record_of(event_pb2.Event(wall_time=time.time(), step=max(0, step), session_log=log))


def scalars(values: dict[str, float], *, step: int, at: float) -> bytes:
    """One point of each tag; `at` is its wall time, NaN: now."""
    from tensorboard.compat.proto import summary_pb2

    points = [
        summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
    ]
    return summary(
        summary_pb2.Summary(value=points), step=step, at=time.time() if math.isnan(at) else at
    )


def text(tag: str, markdown: str, step: int, at: float) -> bytes:
    """One text, as the text plugin reads it."""
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
    from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

    plugin = summary_pb2.SummaryMetadata.PluginData(
        plugin_name="text", content=TextPluginData(version=0).SerializeToString()
    )
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, string_val=[markdown.encode()], tensor_shape=shape
    )
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
    value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
    return summary(summary_pb2.Summary(value=[value]), step=max(0, step), at=at)


def last_texts(folder: Path) -> dict[str, Text]:
    """The last text of each tag in the event files of `folder`, in the order of their names. Raises
    OSError.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    names = sorted(filter(_NAME.match, os.listdir(folder))) if folder.is_dir() else []
    last: dict[str, Text] = {}
    for name in names:
        with contextlib.suppress(DecodeError):  # a reader does not get past such a record either
            for data in _records(read_file(folder / name)):
                event = Event.FromString(data)
                for value in event.summary.value:
                    if value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
                        markdown = value.tensor.string_val[0].decode(errors="replace")
                        last[value.tag] = Text(value.tag, markdown, event.step, event.wall_time)
    return last


def hparams(values: dict[str, Any], *, name: str, at: float, metrics: tuple[str, ...]) -> bytes:
    """The settings of a run as the hparams plugin reads them. Its public API imports tensorflow;
    this part does not.
    """
    from tensorboard.plugins.hparams import summary_v2

    columns = [summary_v2.HParam(key) for key in values]
    config = summary_v2.hparams_config_pb(columns, [summary_v2.Metric(tag) for tag in metrics])
    session = summary_v2.hparams_pb(values, trial_id=name)
    return summary(config, step=0, at=at) + summary(session, step=0, at=at)


def hparams_end(*, good: bool, at: float) -> bytes:
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.Status.Value("STATUS_SUCCESS" if good else "STATUS_FAILURE")
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=at)
    value = summary_pb2.Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(
            plugin_data_pb2.HParamsPluginData(session_end_info=info)
        ),
        tensor=metadata.NULL_TENSOR,
    )
    return summary(summary_pb2.Summary(value=[value]), step=0, at=at)


def summary(value: Any, *, step: int, at: float) -> bytes:
    from tensorboard.compat.proto import event_pb2

    return _record_of(event_pb2.Event(wall_time=at, step=step, summary=value))


def _record_of(event: Any) -> bytes:
    return record(event.SerializeToString())


def record(data: bytes) -> bytes:
    """One TFRecord: length, its masked CRC-32C, data, its masked CRC-32C; little-endian."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    header = struct.pack("<Q", len(data))
    return (
        header
        + struct.pack("<I", masked_crc32c(header))
        + data
        + struct.pack("<I", masked_crc32c(data))
    )


def _records(data: bytes) -> Iterator[bytes]:
    """The contents of the TFRecords in `data`, up to the first that is cut off or damaged."""
    offset = 0
    while len(data) - offset >= 16:
        (length,) = struct.unpack_from("<Q", data, offset)
        content = data[offset + 12 : offset + 12 + length]
        whole = record(content)
        if data[offset : offset + len(whole)] != whole:
            return
        yield content
        offset += len(whole)


def _version() -> bytes:
    from tensorboard.compat.proto import event_pb2

    return record(
        event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
    )
