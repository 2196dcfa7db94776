"""Documents out of source files: streamed, bounded in memory, bad ones counted and passed over."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import msgspec

from guardrail.core.packages import require_package
from trainer.config.sections import BUILTIN
from trainer.data.bad_records import (
    ARCHIVE,
    EMPTY,
    ENCODING,
    FIELD,
    JSON,
    LARGE,
    UNREADABLE,
    BadRecords,
)
from trainer.data.progress import Progress
from trainer.data.source_file import SourceFile

CHUNK = 1 << 18
# Compressed bytes that are fed to zstd at once: they may unfold to 32,768 times as many.
_ZSTD_FEED = 1 << 10


class Document(msgspec.Struct, frozen=True):
    """One document as it goes to the tokenizer.

    Attributes:
        file: index of its file in the list that was read.
        record: line of a JSONL, counting from 1; 0: the whole file.
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
        max_bytes: a file (as one document) or a line longer than this is a bad record, and is never
        held whole.
        pulse: called often; its `share` is set to the share of the bytes on disk that has been
        read.
    """

    def __init__(
        self, files: list[SourceFile], *, text_field: str, max_bytes: int, pulse: Progress
    ) -> None:
        self.files, self.text_field, self.max_bytes, self.pulse = (
            files,
            text_field,
            max_bytes,
            pulse,
        )
        self.bad = BadRecords()
        self._before = list(itertools.accumulate((file.size for file in files), initial=0))
        self._index = 0

    def __iter__(self) -> Iterator[Document]:
        for index in range(len(self.files)):
            yield from self.file(index)

    def file(self, index: int) -> Iterator[Document]:
        """The documents of one file."""
        file, self._index = self.files[index], index
        self._at(0)
        try:
            if file.records:
                with _Stream(file, self._at) as stream:
                    yield from self._records(index, stream)
            else:
                yield from self._whole(index)
        except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdDamage) as error:
            self._reject(file, ARCHIVE, reason=str(error))
        except OSError as error:
            self._reject(file, UNREADABLE, reason=error.strerror or str(error))

    def _whole(self, index: int) -> Iterator[Document]:
        file = self.files[index]
        if file.size > self.max_bytes and not file.compression:
            self._reject(
                file,
                LARGE,
                reason=f"{file.size:,} bytes, data.max_document_bytes is {self.max_bytes:,}",
            )
            return
        parts, held = [], 0
        with _Stream(file, self._at) as stream:
            while chunk := stream.read(CHUNK):
                held += len(chunk)
                if held > self.max_bytes:
                    self._reject(
                        file, LARGE, reason=f"more than data.max_document_bytes, {self.max_bytes:,}"
                    )
                    return
                parts.append(chunk)
        yield from self._document(index, 0, b"".join(parts))

    def _records(self, index: int, stream: _Stream) -> Iterator[Document]:
        file = self.files[index]
        for number, line in _lines(stream, self.max_bytes):
            if line is None:
                self._reject(
                    file, LARGE, number, f"more than data.max_document_bytes, {self.max_bytes:,}"
                )
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                continue
            try:
                record = _json(line)
            except UnicodeDecodeError as error:
                self._reject(file, ENCODING, number, _position(error))
            except json.JSONDecodeError as error:
                self._reject(file, JSON, number, f"column {error.colno}: {error.msg}")
            except (ValueError, RecursionError) as error:
                self._reject(file, JSON, number, str(error))
            else:
                yield from self._field(index, number, record)

    def _field(self, index: int, number: int, record: Any) -> Iterator[Document]:
        file = self.files[index]
        if not isinstance(record, dict):
            self._reject(file, FIELD, number, f"{_json_type(record)} instead of an object")
        elif self.text_field not in record:
            fields = ", ".join(sorted(record)[:8]) or "none"
            self._reject(file, FIELD, number, f"no {self.text_field!r}; its fields: {fields}")
        elif not isinstance(record[self.text_field], str):
            kind = _json_type(record[self.text_field])
            self._reject(file, FIELD, number, f"{self.text_field!r} is {kind} instead of a string")
        else:
            yield from self._document(index, number, record[self.text_field])

    def _document(self, index: int, record: int, content: bytes | str) -> Iterator[Document]:
        file = self.files[index]
        try:
            text = content if isinstance(content, str) else content.decode("utf-8")
            size = len(text.encode("utf-8")) if isinstance(content, str) else len(content)
        except UnicodeDecodeError as error:
            self._reject(file, ENCODING, record, _position(error))
        except UnicodeEncodeError as error:
            self._reject(
                file, ENCODING, record, f"half a surrogate pair at character {error.start:,}"
            )
        else:
            if not text or text.isspace():
                self._reject(file, EMPTY, record)
            else:
                yield Document(index, record, text, size)

    def _reject(self, file: SourceFile, kind: str, record: int = 0, reason: str = "") -> None:
        # Files of the interpreter in another encoding are no news for anybody.
        if not file.key.startswith(BUILTIN):
            self.bad.add(kind, file.path, record, reason)

    def _at(self, position: int) -> None:
        self.pulse.share = (self._before[self._index] + position) / max(1, self._before[-1])
        self.pulse()


class _ZstdDamage(Exception):
    pass


class _Stream:
    """A source file, decompressed; `read(n)` gives between 1 and n bytes, or b"" at the end.

    A compressed file that ends too early raises EOFError (zlib.error, BadGzipFile or _ZstdDamage
    when the content is wrong), after all that could be read of it has been given.
    """

    def __init__(self, file: SourceFile, at: Callable[[int], None]) -> None:
        self._file, self._at = file, at

    def __enter__(self) -> _Stream:
        if self._file.path.startswith(BUILTIN):
            from io import BytesIO

            from trainer.data import builtin

            self._raw: IO[bytes] = BytesIO(builtin.read(self._file.path))
        else:
            # A pipe that took the file's place since must not hang us.
            descriptor = os.open(self._file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._raw = os.fdopen(descriptor, "rb")
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._raw.close()
                raise OSError("not a regular file")
        self._read: Callable[[int], bytes] = self._raw.read
        if self._file.compression == "gz":
            # `read` would lose what it has already decompressed when it meets the damage.
            self._read = gzip.GzipFile(fileobj=self._raw).read1
        elif self._file.compression == "zst":
            self._read = _Zstd(self._raw).read
        return self

    def __exit__(self, *exc: object) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        self._at(min(self._file.size, self._raw.tell()))
        return self._read(size)


class _Zstd:
    """Decompresses zstd frames one after another.

    zstandard's own stream reader takes a truncated file for a complete one; the decompression
    object knows.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        require_package("zstandard", "a .zst file")
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._fed = False  # the frame has begun
        self._input = b""
        self._output = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._output) < size:
            if self._frame.eof:
                self._input = self._frame.unused_data + self._input
                self._frame, self._fed = self._new(), False
            chunk = self._input[:_ZSTD_FEED] or self._raw.read(_ZSTD_FEED)
            self._input = self._input[_ZSTD_FEED:]
            if not chunk:
                break
            self._fed = True
            try:
                self._output += self._frame.decompress(chunk)
            except self._error as error:
                if self._output:  # what came before the damage is given first
                    self._input = chunk + self._input
                    break
                raise _ZstdDamage(str(error)) from error
        if not self._output and self._fed and not self._frame.eof:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        taken = bytes(self._output[:size])
        del self._output[:size]
        return taken


def _lines(stream: _Stream, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, line without its end); None for a line longer than `limit`, which is
    never held whole.

    When the stream breaks, the line that it broke in is dropped with it.
    """
    parts: list[bytes] = []
    number, held, too_long = 1, 0, False
    while chunk := stream.read(CHUNK):
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            if too_long or held + len(piece) > limit:
                yield number, None
            elif parts:
                yield number, b"".join([*parts, piece])
            else:
                yield number, piece
            number, parts, held, too_long = number + 1, [], 0, False
        held += len(rest)
        if held > limit:
            parts, too_long = [], True
        elif rest and not too_long:
            parts.append(rest)
    if too_long:
        yield number, None
    elif parts:
        yield number, b"".join(parts)


def _json(line: bytes) -> Any:
    """The value of one line. Raises UnicodeDecodeError or ValueError with a message for a
    person.
    """
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # json takes NaN and half surrogate pairs, which msgspec does not, and its messages name the
        # column.
        return json.loads(line.decode("utf-8"))


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return (
        "a string"
        if isinstance(value, str)
        else "a list"
        if isinstance(value, list)
        else "an object"
    )


def _position(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at {error.start:,}: {error.reason}"
