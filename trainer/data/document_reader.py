"""Documents out of source files: streamed, bounded in memory; bad ones are counted and skipped."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec

from trainer.data.progress import Progress
from trainer.data.streams import CHUNK, Stream, ZstdDamage, read_lines
from trainer.sources.bad_records import (
    ARCHIVE,
    EMPTY,
    ENCODING,
    FIELD,
    JSON,
    LARGE,
    UNREADABLE,
    BadRecords,
)
from trainer.sources.registry import find_source
from trainer.sources.source_file import SourceFile

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NAMED_FIELDS = 8  # fields of a record that a message names


class Document(msgspec.Struct, frozen=True):
    """One document as it goes to the tokenizer.

    Attributes:
        file: index of its file in the list that was read.
        record: line of a JSONL file, counting from 1; 0: the complete file.
        text: valid Unicode, not blank.
        bytes: length of the text in UTF-8.
    """

    file: int
    record: int
    text: str
    bytes: int


class DocumentReader:
    """Reads documents one after another.

    Args:
        files: what `discover` found.
        text_field: field of a JSON record that holds the text.
        max_bytes: a document longer than this is a bad record, and is never completely in memory.
            A document is a file, or a line of a JSONL file.
        pulse: called often; its `share` is set to the share of the bytes on disk that was read.
    """

    def __init__(
        self, files: list[SourceFile], *, text_field: str, max_bytes: int, pulse: Progress
    ) -> None:
        self.files, self.text_field = files, text_field
        self.max_bytes, self.pulse = max_bytes, pulse
        self.bad = BadRecords()
        self._bytes_before = list(itertools.accumulate((file.size for file in files), initial=0))
        self._index = 0

    def __iter__(self) -> Iterator[Document]:
        for index in range(len(self.files)):
            yield from self.read_file(index)

    def read_file(self, index: int) -> Iterator[Document]:
        """Yield the documents of one file."""
        file, self._index = self.files[index], index
        self._report_position(0)
        try:
            if file.records:
                with Stream(file, self._report_position) as stream:
                    yield from self._read_records(index, stream)
            else:
                yield from self._read_document(index)
        except (EOFError, zlib.error, gzip.BadGzipFile, ZstdDamage) as error:
            self._reject(file, ARCHIVE, reason=str(error))
        except OSError as error:
            self._reject(file, UNREADABLE, reason=error.strerror or str(error))

    def _read_document(self, index: int) -> Iterator[Document]:
        """Yield the file as one document."""
        file = self.files[index]
        if file.size > self.max_bytes and not file.compression:
            reason = f"{file.size:,} bytes, data.max_document_bytes is {self.max_bytes:,}"
            self._reject(file, LARGE, reason=reason)
            return
        parts, held = [], 0
        with Stream(file, self._report_position) as stream:
            while chunk := stream.read(CHUNK):
                held += len(chunk)
                if held > self.max_bytes:
                    self._reject(file, LARGE, reason=self._over_limit())
                    return
                parts.append(chunk)
        yield from self._take_bytes(index, b"".join(parts))

    def _read_records(self, index: int, stream: Stream) -> Iterator[Document]:
        """Yield one document per line of a JSONL file."""
        file = self.files[index]
        for number, line in read_lines(stream, self.max_bytes):
            if line is None:
                self._reject(file, LARGE, number, self._over_limit())
                continue
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.isspace() or not line:
                continue
            try:
                record = _decode_json(line)
            except UnicodeDecodeError as error:
                self._reject(file, ENCODING, number, _describe_position(error))
            except json.JSONDecodeError as error:
                self._reject(file, JSON, number, f"column {error.colno}: {error.msg}")
            except (ValueError, RecursionError) as error:
                self._reject(file, JSON, number, str(error))
            else:
                yield from self._take_record(index, number, record)

    def _take_record(self, index: int, number: int, record: Any) -> Iterator[Document]:
        """Yield the text field of a record, if it has one."""
        file = self.files[index]
        if not isinstance(record, dict):
            self._reject(file, FIELD, number, f"{_json_type(record)} instead of an object")
        elif self.text_field not in record:
            fields = ", ".join(sorted(record)[:_NAMED_FIELDS]) or "none"
            self._reject(file, FIELD, number, f"no {self.text_field!r}; its fields: {fields}")
        elif not isinstance(record[self.text_field], str):
            kind = _json_type(record[self.text_field])
            self._reject(file, FIELD, number, f"{self.text_field!r} is {kind} instead of a string")
        else:
            yield from self._take_string(index, number, record[self.text_field])

    def _take_bytes(self, index: int, content: bytes) -> Iterator[Document]:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            self._reject(self.files[index], ENCODING, reason=_describe_position(error))
            return
        yield from self._take_text(index, 0, text, len(content))

    def _take_string(self, index: int, record: int, text: str) -> Iterator[Document]:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            reason = f"half a surrogate pair at character {error.start:,}"
            self._reject(self.files[index], ENCODING, record, reason)
            return
        yield from self._take_text(index, record, text, size)

    def _take_text(self, index: int, record: int, text: str, size: int) -> Iterator[Document]:
        if not text or text.isspace():
            self._reject(self.files[index], EMPTY, record)
        else:
            yield Document(index, record, text, size)

    def _over_limit(self) -> str:
        return f"more than data.max_document_bytes, {self.max_bytes:,}"

    def _reject(self, file: SourceFile, kind: str, record: int = 0, reason: str = "") -> None:
        """Count a bad record, unless its source does not report them."""
        if find_source(file.source).counts_bad_records:
            self.bad.add(kind, file.path, record, reason)

    def _report_position(self, position: int) -> None:
        read = self._bytes_before[self._index] + position
        self.pulse.share = read / max(1, self._bytes_before[-1])
        self.pulse()


def _decode_json(line: bytes) -> Any:
    """Return the value of one line.

    Raises UnicodeDecodeError, or ValueError with a message that names the column.
    """
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # json accepts NaN and half surrogate pairs, which msgspec does not.
        return json.loads(line.decode("utf-8"))


def _json_type(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    return "an object"


def _describe_position(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at {error.start:,}: {error.reason}"
