"""A prepared corpus, memory-mapped: samples by id, and the documents that a sample was cut from.

The time to open it does not depend on the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from guardrail.core.errors import DataError
from guardrail.core.records.spans import MAX_NAMED, DocumentRef
from trainer.data.shards import FileEntry, SplitIndex
from trainer.data.tokenizer import Tokenizer, id_dtype, load_saved
from trainer.sources.bad_records import BadRecords

FORMAT = 1
INDEX = "corpus.json"


class CorpusReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of the sources.

    Attributes:
        documents, bytes, tokens: of all usable documents in both splits; EOS tokens count.
        bad: kind of bad record -> how many.
        named: kind of bad record -> the first ones, "PATH:LINE (what is wrong)".
        rebuilt: why the copy in the cache was not used; "": there was none.
    """

    documents: int
    bytes: int
    tokens: int
    bad: dict[str, int] = {}
    named: dict[str, list[str]] = {}
    rebuilt: str = ""

    def lines(self) -> list[str]:
        """Return one line per fact, for the user."""
        lines = [f"{self.documents:,} documents, {self.bytes:,} bytes, {self.tokens:,} tokens"]
        lines += [f"skipped {line}" for line in BadRecords(self.bad, self.named).lines()]
        if self.rebuilt:
            lines.append(f"tokenised again: {self.rebuilt}")
        return lines


class CorpusIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The content of corpus.json, which is written last."""

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
    # "names": the paths, one after another; "ends": int64 end of each path; "tokenizer".
    files: dict[str, FileEntry]
    report: CorpusReport


class Corpus:
    """Samples of a training and an evaluation split, in shards on disk.

    Attributes:
        path: its folder.
        fingerprint: SHA-256 of the tokens and of the settings that made them; the same on every
            machine.
        vocabulary: size of the embedding that the ids need.
        eos, pad: special ids; `pad` may be None.
        sequence_length: tokens of a sample.
        train, eval: the splits; `eval` may be empty.
        report: documents, tokens and bad records.
    """

    def __init__(self, path: Path, index: CorpusIndex) -> None:
        self.path, self._index = path, index
        self.fingerprint, self.vocabulary = index.fingerprint, index.vocabulary
        self.eos, self.pad = index.eos, index.pad
        self.sequence_length, self.report = index.sequence_length, index.report
        self.train, self.eval = Split(self, "train"), Split(self, "eval")

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Return the corpus of a folder. Raises DataError if a file is missing or has a wrong size."""
        index, damage = inspect_corpus(Path(path))
        if index is None:
            raise DataError(
                f"{path}: not a usable corpus ({damage})\n  hint: delete the folder; it is built again"
            )
        return cls(Path(path), index)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_saved(self.path, self._index.tokenizer)

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocabulary)

    def split_index(self, name: str) -> SplitIndex:
        """Return the index of the split "train" or "eval"."""
        return self._index.splits[name]

    def file_name(self, number: int) -> str:
        """Return the path of a source file."""
        ends, names = self._file_names
        first = 0
        if number:
            first = int(ends[number - 1])
        return bytes(names[first : int(ends[number])]).decode("utf-8")

    def file_number(self, name: str) -> int:
        """Return the number of the source file with this path. Raises KeyError."""
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
        """Tokens of the split that belong to samples."""
        return self._index.tokens

    def tokens(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the tokens of samples: ids [B] -> int64 [B, sequence_length + 1].

        Raises IndexError for an id that does not exist.
        """
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
        """Return the documents of a sample in order, each with its bytes that the sample holds.

        A token that is part of a character has the byte span of that character.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a split of {len(self)}")
        # stream positions, `last` included
        first, last = sample * self._length, (sample + 1) * self._length
        begin, end = self._document_at(first), self._document_at(last)
        cut = self._column("cut")
        refs = []
        for document in range(begin, end + 1):
            first_byte, last_byte = 0, int(self._column("bytes")[document])
            if document == begin:
                first_byte = int(cut[2 * sample])
            if document == end:
                last_byte = int(cut[2 * sample + 3])
            if first_byte < last_byte:  # else the sample holds only its EOS
                refs.append(self._ref(document, first_byte, last_byte))
        return refs

    def _document_at(self, position: int) -> int:
        """Return the document that holds a position of the stream."""
        return int(np.searchsorted(self._column("start"), position, "right")) - 1

    def documents_of(
        self, samples: Iterable[int], *, limit: int | None = MAX_NAMED
    ) -> tuple[list[DocumentRef], int]:
        """Return the documents of samples, adjacent ranges of one document joined.

        Returns:
            The first `limit` of them, and how many there are.
        """
        refs: list[DocumentRef] = []
        for sample in sorted(set(samples)):
            for ref in self.documents(sample):
                if refs and _touch(refs[-1], ref):
                    last_byte = max(refs[-1].last_byte, ref.last_byte)
                    refs[-1] = msgspec.structs.replace(refs[-1], last_byte=last_byte)
                else:
                    refs.append(ref)
        return refs[:limit], len(refs)

    def excerpt(self, what: int | DocumentRef, limit: int = 200) -> str:
        """Return the beginning of a sample, or of a range of a document, as one clean line.

        The text comes from the shards, so no source file is needed.

        Raises:
            KeyError: the document is not of this split.
        """
        from guardrail.core.text import clean_text

        # clean_text removes characters, and a character may take four tokens.
        wanted = 4 * limit + 16
        if isinstance(what, int):
            tokens = self.tokens([what])[0][:wanted]
        else:
            first, last = self._positions(what)
            tokens = self._stream(first, min(last, first + wanted))
        return clean_text(self._corpus.tokenizer.decode(tokens), limit)

    def _ref(self, document: int, first_byte: int, last_byte: int) -> DocumentRef:
        path = self._corpus.file_name(int(self._column("file")[document]))
        record = int(self._column("record")[document])
        return DocumentRef(path=path, record=record, first_byte=first_byte, last_byte=last_byte)

    def _find(self, ref: DocumentRef) -> int:
        """Return the number of a document.

        Documents are in the order of their files, and of their lines within a file.
        """
        file, files = self._corpus.file_number(ref.path), self._column("file")
        first = int(np.searchsorted(files, file, "left"))
        last = int(np.searchsorted(files, file, "right"))
        document = first + int(np.searchsorted(self._column("record")[first:last], ref.record))
        if document >= last or self._column("record")[document] != ref.record:
            raise KeyError(str(ref))
        return document

    def _positions(self, ref: DocumentRef) -> tuple[int, int]:
        """Return the stream positions [first, last) for which `documents` returned `ref`.

        They end at the boundary of a sample or at the document's EOS.
        """
        document = self._find(ref)
        first = self._position(document, ref.first_byte)
        last = self._position(document, ref.last_byte - 1)
        boundary, inside = divmod(last, self._length)
        if not inside and self._column("cut")[2 * boundary + 1] == ref.last_byte:
            return first, last + 1
        return first, self._end(document) - 1

    def _position(self, document: int, byte: int) -> int:
        """Return the last known stream position at or before a byte of a document.

        Known are the start of the document and the boundaries of samples.
        """
        start = int(self._column("start")[document])
        first = -(-start // self._length)  # the first boundary inside
        last = min((self._end(document) - 1) // self._length, len(self))
        starts = self._column("cut")[2 * first : 2 * last + 2 : 2]
        before = int(np.searchsorted(starts, byte, "right"))
        if not before:
            return start
        return (first + before - 1) * self._length

    def _end(self, document: int) -> int:
        """Return the stream position after a document."""
        starts = self._column("start")
        if document + 1 < len(starts):
            return int(starts[document + 1])
        return self.token_count

    def _stream(self, first: int, last: int) -> np.ndarray:
        """Return the tokens [first, last) of the stream, without those that fill no sample."""
        last = min(last, self.token_count)
        if first >= last:
            return np.empty(0, dtype=np.int64)
        # The very last token is a label of the last sample, and the first of none.
        begin = min(len(self) - 1, first // self._length)
        end = min(len(self) - 1, (last - 1) // self._length)
        rows = self.tokens(range(begin, end + 1))
        flat = np.concatenate([rows[:, :-1].reshape(-1), rows[-1, -1:]])
        return flat[first - begin * self._length : last - begin * self._length]

    def _shard(self, number: int) -> np.ndarray:
        """Return a shard as [samples, sequence_length + 1]: a view whose rows share one token."""
        if number not in self._shards:
            flat = _mapped(self._corpus.path, self._index.shards[number], self._corpus.dtype.str)
            windows = np.lib.stride_tricks.sliding_window_view(flat, self._length + 1)
            self._shards[number] = windows[:: self._length]
        return self._shards[number]

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = _mapped(self._corpus.path, self._index.columns[name], "<i8")
        return self._columns[name]


def _touch(one: DocumentRef, following: DocumentRef) -> bool:
    """Return whether two ranges of bytes are of one document and touch or overlap."""
    if (one.path, one.record) != (following.path, following.record):
        return False
    return one.first_byte <= following.first_byte <= one.last_byte


def _mapped(folder: Path, entry: FileEntry, dtype: str) -> np.ndarray:
    """Return an array over a memory-mapped file.

    It is no np.memmap, since every access to one builds a Python object.
    """
    if not entry.bytes:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(folder / entry.name, dtype=dtype, mode="r"))


def inspect_corpus(path: Path) -> tuple[CorpusIndex | None, str]:
    """Return (index, "") of a usable corpus, else (None, what is wrong). Reads no tokens."""
    try:
        index = msgspec.json.decode((path / INDEX).read_bytes(), type=CorpusIndex)
    except FileNotFoundError:
        if not path.exists():
            return None, "no such folder"
        return None, f"no {INDEX}"
    except (OSError, msgspec.DecodeError) as error:
        return None, f"{INDEX}: {error}"
    if index.format != FORMAT:
        return None, f"format {index.format} instead of {FORMAT}"
    entries = list(index.files.values())
    for split in index.splits.values():
        entries += split.files
    for entry in entries:
        try:
            size = (path / entry.name).stat().st_size
        except OSError as error:
            return None, f"{entry.name}: {error.strerror}"
        if size != entry.bytes:
            return None, f"{entry.name} has {size:,} bytes instead of {entry.bytes:,}"
    return index, ""
