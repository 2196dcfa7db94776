"""TensorBoard's event files: records of protocol buffers, and a file that takes all or nothing.

A record is what `tensorboard.summary.writer.record_writer.RecordWriter` writes: length, CRC of the
length, data, CRC of the data. An event file begins with a record that names the format.
"""

from __future__ import annotations

import contextlib
import io
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
_HEADER_BYTES = 12  # of a record: length and its CRC
_LEAST_BYTES = 16  # a record without data


class Text(NamedTuple):
    """One text of a tag; `at` is its wall time in seconds."""

    tag: str
    markdown: str
    step: int
    at: float


class EventFile:
    """An event file of this process. The first record makes it.

    Its name sorts after the names of all event files in the folder, because readers take them in
    that order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._size = 0

    def append(self, data: bytes) -> None:
        """Append all of `data`. After an OSError the file is as before."""
        if self._path is not None and not self._path.exists():
            self.close()
        path = self._path
        if path is None:
            path = self._folder / self._new_name()
            data = _encode_version() + data
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, FILE_MODE)
        try:
            write_all(descriptor, data)
        except OSError:
            # A part of a record would end the file for every reader.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._size)
                if not self._size:
                    path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._path = path
        self._size += len(data)

    def close(self) -> None:
        """The next record begins a new file."""
        self._path = None
        self._size = 0

    def _new_name(self) -> str:
        names = map(_NAME.match, os.listdir(self._folder))
        last = max((int(match[1]) for match in names if match), default=0)
        return f"events.out.tfevents.{max(int(time.time()), last + 1):010d}.guardrail.{os.getpid()}"


def encode_restart(step: int) -> bytes:
    """Return a record after which readers forget all earlier points from `step` on."""
    from tensorboard.compat.proto import event_pb2

    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return _encode_event(event_pb2.Event(wall_time=time.time(), step=max(0, step), session_log=log))


def encode_scalars(values: dict[str, float], *, step: int, at: float) -> bytes:
    """Return one point of each tag; `at` is its wall time, NaN: now."""
    from tensorboard.compat.proto import summary_pb2

    points = [
        summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
    ]
    if math.isnan(at):
        at = time.time()
    return _encode_summary(summary_pb2.Summary(value=points), step=step, at=at)


def encode_text(tag: str, markdown: str, step: int, at: float) -> bytes:
    """Return one text, in the format of the text plugin."""
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
    return _encode_summary(summary_pb2.Summary(value=[value]), step=max(0, step), at=at)


def encode_hparams(
    values: dict[str, Any], *, name: str, at: float, metrics: tuple[str, ...]
) -> bytes:
    """Return the settings of a run, in the format of the hparams plugin.

    The public API of the plugin imports tensorflow. `summary_v2` does not.
    """
    from tensorboard.plugins.hparams import summary_v2

    columns = [summary_v2.HParam(key) for key in values]
    config = summary_v2.hparams_config_pb(columns, [summary_v2.Metric(tag) for tag in metrics])
    session = summary_v2.hparams_pb(values, trial_id=name)
    return _encode_summary(config, step=0, at=at) + _encode_summary(session, step=0, at=at)


def encode_hparams_end(*, is_good: bool, at: float) -> bytes:
    """Return the end of a run, in the format of the hparams plugin."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    word = "STATUS_SUCCESS" if is_good else "STATUS_FAILURE"
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(word), end_time_secs=at)
    value = summary_pb2.Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(
            plugin_data_pb2.HParamsPluginData(session_end_info=info)
        ),
        tensor=metadata.NULL_TENSOR,
    )
    return _encode_summary(summary_pb2.Summary(value=[value]), step=0, at=at)


def read_last_texts(folder: Path) -> dict[str, Text]:
    """Return the last text of each tag in the event files of `folder`, read in order of their names.

    Raises:
        OSError: a file cannot be read. A missing folder has no texts.
    """
    from google.protobuf.message import DecodeError

    if not folder.is_dir():
        return {}
    last: dict[str, Text] = {}
    for name in sorted(filter(_NAME.match, os.listdir(folder))):
        # Readers of TensorBoard stop at a damaged record too.
        with contextlib.suppress(DecodeError):
            for text in _read_texts(read_file(folder / name)):
                last[text.tag] = text
    return last


def _read_texts(data: bytes) -> Iterator[Text]:
    from tensorboard.compat.proto.event_pb2 import Event

    for content in _read_records(data):
        event = Event.FromString(content)
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
                markdown = value.tensor.string_val[0].decode(errors="replace")
                yield Text(value.tag, markdown, event.step, event.wall_time)


def _read_records(data: bytes) -> Iterator[bytes]:
    """Give the contents of the records in `data`, up to the first that is cut off or damaged."""
    offset = 0
    while len(data) - offset >= _LEAST_BYTES:
        (length,) = struct.unpack_from("<Q", data, offset)
        begin = offset + _HEADER_BYTES
        content = data[begin : begin + length]
        record = encode_record(content)
        if data[offset : offset + len(record)] != record:
            return
        yield content
        offset += len(record)


def _encode_version() -> bytes:
    from tensorboard.compat.proto import event_pb2

    return _encode_event(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))


def _encode_summary(summary: Any, *, step: int, at: float) -> bytes:
    from tensorboard.compat.proto import event_pb2

    return _encode_event(event_pb2.Event(wall_time=at, step=step, summary=summary))


def _encode_event(event: Any) -> bytes:
    return encode_record(event.SerializeToString())


def encode_record(data: bytes) -> bytes:
    """Return `data` as one record of an event file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(data)
    return buffer.getvalue()
