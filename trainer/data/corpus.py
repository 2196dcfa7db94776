"""A prepared corpus, memory-mapped: samples by id, and the documents that a sample was cut from.

Opening costs the same for a thousand samples and for a billion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from guardrail.core.errors import DataError
from guardrail.core.records import MAX_NAMED, DocumentRef
from trainer.data.shards import FileEntry, SplitIndex
from trainer.data.tokenizer import Tokenizer, id_dtype, load_saved
from trainer.sources.bad_records import BadRecords

FORMAT = 1
INDEX = "corpus.json"


class CorpusReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of the sources.

    Attributes:
        documents, bytes, tokens: of all usable documents, both splits, EOS included.
        bad: kind of bad record -> how many; named: kind -> the first few, "PATH:LINE (what is
        wrong)".
        rebuilt: why an older copy in the cache was not used, "" if there was none.
    """

    documents: int
    bytes: int
    tokens: int
    bad: dict[str, int] = {}
    named: dict[str, list[str]] = {}
    rebuilt: str = ""

    def lines(self) -> list[str]:
        """One line a fact, for a person."""
        lines = [f"{self.documents:,} documents, {self.bytes:,} bytes, {self.tokens:,} tokens"]
        lines += [f"passed over {line}" for line in BadRecords(self.bad, self.named).lines()]
        return lines + ([f"tokenised again: {self.rebuilt}"] if self.rebuilt else [])


class CorpusIndex(msgspec.Struct, frozen=True, kw_only=True):
    """corpus.json; written last."""

    format: int
    fingerprint: str
    tokenizer: str
    tokenizer_identity: str
    vocabulary: int
    eos: int
    pad: int | None
    sequence_length: int
    eval_fraction: float
    splits: dict[str, SplitIndex]
    # "names": the paths, one after another; "ends": int64 end of each; the tokenizer
    files: dict[str, FileEntry]
    report: CorpusReport


class Corpus:
    """Attributes:
    path: its folder. fingerprint: SHA-256 of the tokens in their shards and of the settings that
    made them; the same on every machine. vocabulary: size of the embedding that the ids need.
    `eos`, `pad`: special ids; `pad` may be None. sequence_length: tokens that a model sees of a
    sample. train, eval: the splits; `eval` may be empty. report: documents, tokens and bad records.
    """

    def __init__(self, path: Path, index: CorpusIndex) -> None:
        self.path, self._index = path, index
        self.fingerprint, self.vocabulary = index.fingerprint, index.vocabulary
        self.eos, self.pad = index.eos, index.pad
        self.sequence_length, self.report = index.sequence_length, index.report
        self.train, self.eval = Split(self, "train"), Split(self, "eval")

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Raises DataError when something is missing or has another size than its index says."""
        index, damage = inspect_corpus(Path(path))
        if index is None:
            raise DataError(f"{path}: not a usable corpus ({damage})")
        return cls(Path(path), index)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_saved(self.path, self._index.tokenizer)

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocabulary)

    def split_index(self, name: str) -> SplitIndex:
        return self._index.splits[name]

    def file_name(self, number: int) -> str:
        ends, names = self._file_names
        first = int(ends[number - 1]) if number else 0
        return bytes(names[first : int(ends[number])]).decode("utf-8")

    def file_number(self, name: str) -> int:
        """Raises KeyError."""
        ends, names = self._file_names
        wanted = name.encode("utf-8", "backslashreplace")
        lengths = np.diff(ends, prepend=0)
        for number in np.flatnonzero(lengths == len(wanted)):
            if bytes(names[int(ends[number]) - len(wanted) : int(ends[number])]) == wanted:
                return int(number)
        raise KeyError(name)

    @cached_property
    def _file_names(self) -> tuple[np.ndarray, np.ndarray]:
        files = self._index.files
        return _mapped(self.path, files["ends"], "<i8"), _mapped(self.path, files["names"], "u1")


class Split:
    """The samples of one split; ids count from 0 in the order of the documents."""

    def __init__(self, corpus: Corpus, name: str) -> None:
        self._corpus, self.name = corpus, name
        self._index = corpus.split_index(name)
        self._length = corpus.sequence_length
        self._shards: dict[int, np.ndarray] = {}
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._index.samples

    @property
    def document_count(self) -> int:
        return self._index.documents

    @property
    def token_count(self) -> int:
        """Tokens of the split that stand in samples."""
        return self._index.tokens

    def tokens(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sample ids [B] -> tokens [B, sequence_length + 1], int64. Raises IndexError."""
        ids = np.asarray(samples, dtype=np.int64).reshape(-1)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} of a split of {len(self)}")
        rows = np.empty((len(ids), self._length + 1), dtype=np.int64)
        shards, offsets = np.divmod(ids, self._index.samples_per_shard)
        for shard in np.unique(shards):
            here = shards == shard
            rows[here] = self._shard(int(shard))[offsets[here]]
        return rows

    def documents(self, sample: int) -> list[DocumentRef]:
        """The documents of one sample in their order, each with the bytes that the sample holds of
        it.

        The span of a token that is a part of a character is that of the whole character.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a split of {len(self)}")
        # stream positions, `last` included
        first, last = sample * self._length, (sample + 1) * self._length
        begin, end = (
            int(np.searchsorted(self._column("start"), at, "right")) - 1 for at in (first, last)
        )
        cut = self._column("cut")
        refs = []
        for document in range(begin, end + 1):
            first_byte = int(cut[2 * sample]) if document == begin else 0
            last_byte = (
                int(cut[2 * sample + 3])
                if document == end
                else int(self._column("bytes")[document])
            )
            if first_byte < last_byte:  # else the sample has nothing but its EOS
                refs.append(self._ref(document, first_byte, last_byte))
        return refs

    def documents_of(
        self, samples: Iterable[int], *, limit: int | None = MAX_NAMED
    ) -> tuple[list[DocumentRef], int]:
        """The documents of many samples, stretches that touch joined; the first `limit`, and how
        many there are.
        """
        refs: list[DocumentRef] = []
        for sample in sorted(set(samples)):
            for ref in self.documents(sample):
                last = refs[-1] if refs else None
                same = last is not None and (last.path, last.record) == (ref.path, ref.record)
                if (
                    last is not None
                    and same
                    and last.first_byte <= ref.first_byte <= last.last_byte
                ):
                    refs[-1] = msgspec.structs.replace(
                        last, last_byte=max(last.last_byte, ref.last_byte)
                    )
                else:
                    refs.append(ref)
        return refs[:limit], len(refs)

    def excerpt(self, what: int | DocumentRef, limit: int = 200) -> str:
        """The beginning of a sample, or of a stretch of a document, as the model met it: one clean
        line.

        Comes from the shards, so it needs no source file. Raises KeyError for a document that is
        not of this split.
        """
        from guardrail.core.text import clean_text

        # clean() takes characters out, and a character may take four tokens
        wanted = 4 * limit + 16
        if isinstance(what, int):
            return clean_text(self._corpus.tokenizer.decode(self.tokens([what])[0][:wanted]), limit)
        first, last = self._positions(what)
        return clean_text(
            self._corpus.tokenizer.decode(self._stream(first, min(last, first + wanted))), limit
        )

    def _ref(self, document: int, first_byte: int, last_byte: int) -> DocumentRef:
        path = self._corpus.file_name(int(self._column("file")[document]))
        record = int(self._column("record")[document])
        return DocumentRef(path=path, record=record, first_byte=first_byte, last_byte=last_byte)

    def _find(self, ref: DocumentRef) -> int:
        """Documents stand in the order of their files, and in that of their lines within one."""
        file = self._corpus.file_number(ref.path)
        first, last = (
            int(np.searchsorted(self._column("file"), file, side)) for side in ("left", "right")
        )
        document = first + int(np.searchsorted(self._column("record")[first:last], ref.record))
        if document >= last or self._column("record")[document] != ref.record:
            raise KeyError(str(ref))
        return document

    def _positions(self, ref: DocumentRef) -> tuple[int, int]:
        """The stretch of the stream that `documents` gave `ref` for: it ends at a sample's boundary
        or its EOS.
        """
        document = self._find(ref)
        first, last = (
            self._position(document, byte) for byte in (ref.first_byte, ref.last_byte - 1)
        )
        boundary, inside = divmod(last, self._length)
        if not inside and self._column("cut")[2 * boundary + 1] == ref.last_byte:
            return first, last + 1
        return first, self._end(document) - 1

    def _position(self, document: int, byte: int) -> int:
        """The last known stream position at or before a byte of a document: its start, or a
        sample's boundary.
        """
        start = int(self._column("start")[document])
        first = -(-start // self._length)  # the first boundary inside
        last = min((self._end(document) - 1) // self._length, len(self))
        starts = self._column("cut")[2 * first : 2 * last + 2 : 2]
        before = int(np.searchsorted(starts, byte, "right"))
        return (first + before - 1) * self._length if before else start

    def _end(self, document: int) -> int:
        starts = self._column("start")
        return int(starts[document + 1]) if document + 1 < len(starts) else self.token_count

    def _stream(self, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of the stream; what has been dropped at its end is missing."""
        last = min(last, self.token_count)
        if first >= last:
            return np.empty(0, dtype=np.int64)
        # The very last token is a label of the last sample and no sample's first.
        begin, end = (min(len(self) - 1, at // self._length) for at in (first, last - 1))
        rows = self.tokens(range(begin, end + 1))
        flat = np.concatenate([rows[:, :-1].reshape(-1), rows[-1, -1:]])
        return flat[first - begin * self._length : last - begin * self._length]

    def _shard(self, number: int) -> np.ndarray:
        """A shard as [samples, sequence_length + 1], without a copy: rows overlap by one token."""
        if number not in self._shards:
            flat = _mapped(self._corpus.path, self._index.shards[number], self._corpus.dtype.str)
            windows = np.lib.stride_tricks.sliding_window_view(flat, self._length + 1)
            self._shards[number] = windows[:: self._length]
        return self._shards[number]

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = _mapped(self._corpus.path, self._index.columns[name], "<i8")
        return self._columns[name]


def _mapped(folder: Path, entry: FileEntry, dtype: str) -> np.ndarray:
    """A plain array over the memory map: every access to a np.memmap would build a Python
    object.
    """
    if not entry.bytes:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(folder / entry.name, dtype=dtype, mode="r"))


def inspect_corpus(path: Path) -> tuple[CorpusIndex | None, str]:
    """(index, "") of a usable corpus, else (None, what is wrong with it). Reads no tokens."""
    try:
        index = msgspec.json.decode((path / INDEX).read_bytes(), type=CorpusIndex)
    except FileNotFoundError:
        return None, f"no {INDEX}" if path.exists() else "no such folder"
    except (OSError, msgspec.DecodeError) as error:
        return None, f"{INDEX}: {error}"
    if index.format != FORMAT:
        return None, f"format {index.format} instead of {FORMAT}"
    for entry in [
        *index.files.values(),
        *(entry for split in index.splits.values() for entry in split.files),
    ]:
        try:
            size = (path / entry.name).stat().st_size
        except OSError as error:
            return None, f"{entry.name}: {error.strerror}"
        if size != entry.bytes:
            return None, f"{entry.name} has {size:,} bytes instead of {entry.bytes:,}"
    return index, ""
