"""Bytes of a source file: opened by its source, decompressed, cut into lines."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from typing import IO

from guardrail.core.packages import require_package
from trainer.sources.registry import find_source
from trainer.sources.source_file import SourceFile

CHUNK = 1 << 18  # bytes that are read at once
# Compressed bytes that zstd gets at once: they may unfold to 32,768 times as many.
_ZSTD_FEED = 1 << 10


class ZstdDamage(Exception):
    """The content of a zstd file is wrong."""


class Stream:
    """A source file, decompressed; `read(n)` returns between 1 and n bytes, or b"" at the end.

    First everything that can be read is returned. Then a compressed file that ends too early raises
    EOFError, and wrong content raises zlib.error, gzip.BadGzipFile or ZstdDamage.

    Args:
        report_position: called with the position in the file, in bytes on disk.
    """

    def __init__(self, file: SourceFile, report_position: Callable[[int], None]) -> None:
        self._file, self._report_position = file, report_position

    def __enter__(self) -> Stream:
        self._raw = find_source(self._file.source).open(self._file)
        self._read: Callable[[int], bytes] = self._raw.read
        if self._file.compression == "gz":
            # `read` would lose what it has decompressed before the damage.
            self._read = gzip.GzipFile(fileobj=self._raw).read1
        elif self._file.compression == "zst":
            self._read = _ZstdReader(self._raw).read
        return self

    def __exit__(self, *exc: object) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        self._report_position(min(self._file.size, self._raw.tell()))
        return self._read(size)


class _ZstdReader:
    """Decompresses zstd frames one after another.

    zstandard's own stream reader accepts a truncated file as complete. Its decompression object does
    not.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        require_package("zstandard", "a .zst file")
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._has_begun = False  # whether the frame got any input
        self._input = b""
        self._output = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._output) < size and self._decompress_more():
            pass
        if not self._output and self._has_begun and not self._frame.eof:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        taken = bytes(self._output[:size])
        del self._output[:size]
        return taken

    def _decompress_more(self) -> bool:
        """Decompress one piece of input; return whether there may be more."""
        if self._frame.eof:
            self._input = self._frame.unused_data + self._input
            self._frame, self._has_begun = self._new_frame(), False
        piece = self._input[:_ZSTD_FEED] or self._raw.read(_ZSTD_FEED)
        self._input = self._input[_ZSTD_FEED:]
        if not piece:
            return False
        self._has_begun = True
        try:
            self._output += self._frame.decompress(piece)
        except self._error as error:
            if not self._output:
                raise ZstdDamage(str(error)) from error
            # Return first what came before the damage; the next call meets the damage again.
            self._input = piece + self._input
            return False
        return True


def read_lines(stream: Stream, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number from 1, line without its end); None for a line longer than `limit` bytes.

    Such a line is never completely in memory. When the stream breaks, the line that it broke
    in is dropped.
    """
    parts: list[bytes] = []  # of the line that is not complete yet
    number, held, is_too_long = 1, 0, False
    while chunk := stream.read(CHUNK):
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            if is_too_long or held + len(piece) > limit:
                yield number, None
            else:
                yield number, b"".join([*parts, piece])
            number, parts, held, is_too_long = number + 1, [], 0, False
        held += len(rest)
        if held > limit:
            parts, is_too_long = [], True
        elif rest and not is_too_long:
            parts.append(rest)
    if is_too_long:
        yield number, None
    elif parts:
        yield number, b"".join(parts)
