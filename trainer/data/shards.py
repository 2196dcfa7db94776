"""The files of a split, and the class that writes them.

A split is one stream of tokens: its documents one after another, each with an EOS at its end.
Sample i is the range [i T, i T + T + 1) of the stream, T = `sequence_length`. The last token of a
sample is the first of the next one, so every token but the first is a label exactly once. Tokens at
the end that fill no sample are dropped.

    SPLIT-00000.bin ...  uint16 or uint32: tokens of `samples_per_shard` samples, T each, and one more
    SPLIT-start.idx      int64 [documents]: position of each document in the stream, ascending
    SPLIT-file.idx       int64 [documents]: its file, an index into files.idx
    SPLIT-record.idx     int64 [documents]: its line; 0: the complete file
    SPLIT-bytes.idx      int64 [documents]: its length in bytes
    SPLIT-hash.idx       uint64 [documents]: hash of its origin; only while the corpus is built
    SPLIT-cut.idx        int64 [samples + 1, 2]: byte span, in its document, of the token at i T

All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np

from trainer.data.tokenizer import Encoded

SHARD_BYTES = 256 << 20
_BLOCK_TOKENS = 1 << 20  # tokens that are collected before they are written
_BLOCK_ROWS = 1 << 14  # numbers of a column that are collected before they are written
COLUMNS = ("start", "file", "record", "bytes", "hash", "cut")


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the corpus: its size, and its SHA-256 if it holds tokens."""

    name: str
    bytes: int
    sha256: str = ""


class SplitIndex(msgspec.Struct, frozen=True, kw_only=True):
    """One split in corpus.json.

    Attributes:
        tokens: those that belong to samples.
        stream_tokens: all, with those that fill no sample.
    """

    documents: int
    samples: int
    tokens: int
    stream_tokens: int
    samples_per_shard: int
    shards: list[FileEntry]
    columns: dict[str, FileEntry]

    @property
    def files(self) -> list[FileEntry]:
        return [*self.shards, *self.columns.values()]


class _File:
    """A file that is written; `hashed` ones with their SHA-256. It is synced when it is closed."""

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        self.path = path
        self._stream = open(path, "xb")
        self._hash = hashlib.sha256()
        self._hashed = hashed
        self._bytes = 0

    def write(self, values: np.ndarray) -> None:
        """Append a one-dimensional, contiguous array, without a copy."""
        data = values.view(np.uint8).data
        self._stream.write(data)
        self._bytes += len(data)
        if self._hashed:
            self._hash.update(data)

    def close(self) -> FileEntry:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        if self._hashed:
            return FileEntry(self.path.name, self._bytes, self._hash.hexdigest())
        return FileEntry(self.path.name, self._bytes)

    def abandon(self) -> None:
        self._stream.close()


class _Column:
    """64-bit integers that are appended to a file in blocks: single ones, or arrays."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file, self._dtype = _File(path), dtype
        self._rows: list[int] = []
        self._arrays: list[np.ndarray] = []

    def append(self, value: int) -> None:
        self._rows.append(value)
        if len(self._rows) >= _BLOCK_ROWS:
            self._flush()

    def extend(self, values: np.ndarray) -> None:
        """Append an array; not for a column of single values."""
        self._arrays.append(values.reshape(-1))
        if len(self._arrays) >= _BLOCK_ROWS:
            self._flush()

    def _flush(self) -> None:
        values = np.array(self._rows, dtype=self._dtype)
        if self._arrays:
            values = np.concatenate(self._arrays)
        self._file.write(values.astype(self._dtype))
        self._rows, self._arrays = [], []

    def close(self) -> FileEntry:
        self._flush()
        return self._file.close()

    def abandon(self) -> None:
        self._file.abandon()


class SplitWriter:
    """Packs documents into samples.

    Call `begin`, `add` for each piece, and `end` for each document; then `close`.

    Args:
        folder: must exist; files of this split must not.
        name: "train" or "eval".
        length: tokens of a sample.
        dtype: of the ids.
        eos: id at the end of each document.
        shard_bytes: largest size of a file of tokens.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        length: int,
        dtype: np.dtype,
        eos: int,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder, self._name = folder, name
        self._length, self._dtype, self._eos = length, dtype, eos
        self._per_shard = max(1, shard_bytes // (length * dtype.itemsize))
        self._columns: dict[str, _Column] = {}
        for column in COLUMNS:
            numbers = "<i8"
            if column == "hash":
                numbers = "<u8"
            self._columns[column] = _Column(folder / f"{name}-{column}.idx", numbers)
        self._position = 0  # of the next token in the stream
        self._next_cut = 0  # position of the next sample boundary without a cut
        self._bytes = 0  # of the document so far
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._shard: _File | None = None
        self._shard_samples = 0
        self._shards: list[FileEntry] = []
        self.documents = self.samples = 0

    def begin(self, *, file: int, record: int, origin: int) -> None:
        """Begin a document; `origin`: the hash of its origin."""
        self._columns["start"].append(self._position)
        self._columns["file"].append(file)
        self._columns["record"].append(record)
        self._columns["hash"].append(origin)
        self._bytes = 0
        self.documents += 1

    def add(self, piece: Encoded, size: int) -> None:
        """Add a piece of the document; `size`: its bytes."""
        end = self._position + len(piece.ids)
        if self._next_cut < end:
            cuts = np.arange(self._next_cut, end, self._length)
            self._columns["cut"].extend(piece.spans(cuts - self._position) + self._bytes)
            self._next_cut = int(cuts[-1]) + self._length
        self._bytes += size
        self._append(piece.ids)

    def end(self) -> None:
        """End the document."""
        self._columns["bytes"].append(self._bytes)
        if self._next_cut == self._position:
            self._columns["cut"].extend(np.array([[self._bytes, self._bytes]]))
            self._next_cut += self._length
        self._append(np.array([self._eos], dtype=self._dtype))

    def _append(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        self._position += len(ids)
        if self._pending_tokens >= _BLOCK_TOKENS:
            self._write_samples()

    def _write_samples(self) -> None:
        """Write all complete samples, each without the token that it shares with the next one."""
        if not self._pending:
            return
        tokens = np.concatenate(self._pending)
        ready, at = (len(tokens) - 1) // self._length, 0
        while ready:
            if self._shard is None:
                self._shard = _File(
                    self._folder / f"{self._name}-{len(self._shards):05d}.bin", hashed=True
                )
            count = min(ready, self._per_shard - self._shard_samples)
            self._shard.write(tokens[at : at + count * self._length])
            at, ready = at + count * self._length, ready - count
            self._shard_samples += count
            self.samples += count
            if self._shard_samples == self._per_shard:
                self._close_shard(tokens[at : at + 1])
        self._pending = [tokens[at:]]
        self._pending_tokens = len(tokens) - at

    def _close_shard(self, shared: np.ndarray) -> None:
        """Close a shard with one more token: its last sample needs the first of the next one."""
        assert self._shard is not None
        self._shard.write(shared)
        self._shards.append(self._shard.close())
        self._shard, self._shard_samples = None, 0

    def close(self) -> SplitIndex:
        self._write_samples()
        if self._shard is not None:
            self._close_shard(self._pending[0][:1])
        tokens = 0
        if self.samples:
            tokens = self.samples * self._length + 1
        return SplitIndex(
            documents=self.documents,
            samples=self.samples,
            tokens=tokens,
            stream_tokens=self._position,
            samples_per_shard=self._per_shard,
            shards=self._shards,
            columns={name: column.close() for name, column in self._columns.items()},
        )

    def abandon(self) -> None:
        """Close all files of a split that will not be used."""
        for column in self._columns.values():
            column.abandon()
        if self._shard is not None:
            self._shard.abandon()
