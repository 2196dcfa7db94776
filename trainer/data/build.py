"""Builds a corpus: documents -> tokens -> samples in shards, and their index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from guardrail.core.errors import DataError
from guardrail.core.files import replace_file
from guardrail.core.text import clean_text
from trainer.config.sections import DataSection
from trainer.data import bpe, holdout
from trainer.data.corpus import FORMAT, INDEX, CorpusIndex, CorpusReport
from trainer.data.document_reader import Document, DocumentReader
from trainer.data.progress import Progress
from trainer.data.shards import FileEntry, SplitIndex, SplitWriter
from trainer.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, split_text
from trainer.sources.bad_records import FIELD, NO_TEXT, BadRecords
from trainer.sources.base import ResolvedSources
from trainer.sources.source_file import SourceFile

_BATCH_CHARACTERS = 1 << 17  # that are encoded at once: about 0.1 s of BPE on one core


class Builder:
    """Tokenises the documents of `found` and packs them into `folder`, which exists and is empty.

    Args:
        cache: folder of the trained vocabularies.
        shard_bytes: largest size of a file of tokens.
    """

    def __init__(
        self,
        data: DataSection,
        found: ResolvedSources,
        folder: Path,
        *,
        cache: Path,
        pulse: Progress,
        shard_bytes: int,
    ) -> None:
        self.data, self.found, self.folder, self.cache = data, found, folder, cache
        self.pulse, self.shard_bytes = pulse, shard_bytes
        self.bytes = self.tokens = 0
        self.bad = BadRecords()

    def build(self, *, rebuilt: str) -> None:
        """Build the corpus.

        Args:
            rebuilt: why the copy in the cache was not used; "": there was none.

        Raises:
            DataError: no usable document.
            Interrupted: asked to stop.
        """
        data = self.data
        if not self.found.files:
            raise DataError(_nothing_usable(data, self.found, self.found.bad))
        self.tokenizer = self._tokenizer()
        limit = holdout.hash_threshold(data.eval_fraction)
        self.pulse.begin("tokenizing")
        splits = self._pack(limit)
        better = self._better_limit(limit, splits)
        if better != limit:
            self._remove(splits)
            self.pulse.begin("tokenizing again, with other documents held out")
            splits = self._pack(better)
        for name in splits:
            (self.folder / f"{name}-hash.idx").unlink()
            del splits[name].columns["hash"]
        if not splits["train"].samples:
            raise DataError(self._too_short())
        self._write_index(splits, rebuilt)

    def _tokenizer(self) -> Tokenizer:
        if self.data.tokenizer == "bytes":
            return ByteTokenizer()
        if self.data.tokenizer == "bpe":
            return bpe.train_or_load(
                self._reader(), vocabulary=self.data.vocabulary, cache=self.cache, pulse=self.pulse
            )
        return load_tokenizer(Path(self.data.tokenizer), name=self.data.tokenizer)

    def _reader(self) -> DocumentReader:
        return DocumentReader(
            self.found.files,
            text_field=self.data.text_field,
            max_bytes=self.data.max_document_bytes,
            pulse=self.pulse,
        )

    def _pack(self, limit: int) -> dict[str, SplitIndex]:
        """Tokenise all documents; those whose hash is below `limit` are held out."""
        reader = self._reader()
        writers = {name: self._writer(name) for name in ("train", "eval")}
        self.bytes = self.tokens = 0
        self._used = np.zeros(len(self.found.files), dtype=bool)  # files with a usable document
        try:
            for batch in _batches(reader):
                self.pulse()
                self._pack_batch(batch, writers, limit)
            self.bad = BadRecords()
            self.bad.merge(self.found.bad)
            self.bad.merge(reader.bad)
            for source, first, last in self.found.spans:
                if not self._used[first:last].any():
                    self.bad.add(NO_TEXT, source, reason=f"{last - first:,} files")
            if not any(writer.documents for writer in writers.values()):
                raise DataError(_nothing_usable(self.data, self.found, self.bad))
            return {name: writer.close() for name, writer in writers.items()}
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise

    def _writer(self, name: str) -> SplitWriter:
        return SplitWriter(
            self.folder,
            name,
            length=self.data.sequence_length,
            dtype=self.tokenizer.dtype,
            eos=self.tokenizer.eos,
            shard_bytes=self.shard_bytes,
        )

    def _pack_batch(
        self, batch: list[tuple[Document, str, int]], writers: dict[str, SplitWriter], limit: int
    ) -> None:
        encoded = self.tokenizer.encode_pieces([text for _, text, _ in batch])
        for (document, text, offset), piece in zip(batch, encoded, strict=True):
            key = self.found.files[document.file].key
            if offset == 0:
                origin = holdout.origin_hash(key, document.record)
                self._into = writers["train"]
                if origin < limit:
                    self._into = writers["eval"]
                self._into.begin(file=document.file, record=document.record, origin=origin)
                self.bytes += document.bytes
                self._used[document.file] = True
            self._into.add(piece, _utf8_size(text))
            self.tokens += len(piece.ids)
            if offset + len(text) == len(document.text):
                self._into.end()
                self.tokens += 1

    def _better_limit(self, limit: int, splits: dict[str, SplitIndex]) -> int:
        """Return another threshold if a split is empty and need not be."""
        if not self.data.eval_fraction or all(split.samples for split in splits.values()):
            return limit
        hashes, tokens = [], []
        for name, split in splits.items():
            if split.documents:
                hashes.append(np.fromfile(self.folder / f"{name}-hash.idx", dtype="<u8"))
                starts = np.fromfile(self.folder / f"{name}-start.idx", dtype="<i8")
                tokens.append(np.diff(starts, append=split.stream_tokens))
        return holdout.balance_splits(
            np.concatenate(hashes),
            np.concatenate(tokens),
            limit,
            sample=self.data.sequence_length + 1,
        )

    def _remove(self, splits: dict[str, SplitIndex]) -> None:
        for split in splits.values():
            for entry in split.files:
                (self.folder / entry.name).unlink()

    def _too_short(self) -> str:
        need = self.data.sequence_length + 1
        return (
            f"the usable text in {_sources(self.data)} has {self.tokens:,} tokens: not one training "
            f"sample of data.sequence_length + 1 = {need:,} tokens\n"
            "  hint: give more text, or a shorter data.sequence_length"
        )

    def _write_index(self, splits: dict[str, SplitIndex], rebuilt: str) -> None:
        self.tokenizer.save(self.folder)
        files = self._write_names()
        if self.tokenizer.content:
            files["tokenizer"] = _entry(self.folder / "tokenizer.json")
        report = CorpusReport(
            documents=sum(split.documents for split in splits.values()),
            bytes=self.bytes,
            tokens=self.tokens,
            bad=self.bad.counts,
            named=self.bad.named,
            rebuilt=rebuilt,
        )
        index = CorpusIndex(
            format=FORMAT,
            fingerprint=self._fingerprint(splits),
            tokenizer=self.tokenizer.name,
            tokenizer_identity=self.tokenizer.identity,
            vocabulary=self.tokenizer.vocabulary,
            eos=self.tokenizer.eos,
            pad=self.tokenizer.pad,
            sequence_length=self.data.sequence_length,
            eval_fraction=self.data.eval_fraction,
            splits=splits,
            files=files,
            report=report,
        )
        replace_file(self.folder / INDEX, msgspec.json.format(msgspec.json.encode(index)))

    def _write_names(self) -> dict[str, FileEntry]:
        names = [_encode_path(file) for file in self.found.files]
        replace_file(self.folder / "files.txt", b"".join(names))
        ends = np.cumsum([len(name) for name in names], dtype="<i8")
        replace_file(self.folder / "files.idx", ends.tobytes())
        return {
            "names": _entry(self.folder / "files.txt"),
            "ends": _entry(self.folder / "files.idx"),
        }

    def _fingerprint(self, splits: dict[str, SplitIndex]) -> str:
        """Return a hash of the tokens and of what gives them their meaning; no path, no time."""
        digests: dict[str, list[str]] = {}
        for name, split in splits.items():
            digests[name] = [entry.sha256 for entry in split.shards]
        content = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.identity,
            "eos": self.tokenizer.eos,
            "sequence_length": self.data.sequence_length,
            "eval_fraction": self.data.eval_fraction,
            "shards": digests,
        }
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _batches(reader: DocumentReader) -> Iterator[list[tuple[Document, str, int]]]:
    """Yield batches of (document, piece of its text, offset of the piece in characters).

    A batch has about `_BATCH_CHARACTERS` characters.
    """
    batch: list[tuple[Document, str, int]] = []
    held = 0
    for document in reader:
        offset = 0
        for text in split_text(document.text):
            batch.append((document, text, offset))
            offset, held = offset + len(text), held + len(text)
            if held >= _BATCH_CHARACTERS:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _utf8_size(text: str) -> int:
    """Return the length of a text in UTF-8, without encoding one that is ASCII."""
    if text.isascii():
        return len(text)
    return len(text.encode("utf-8"))


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size)


def _encode_path(file: SourceFile) -> bytes:
    """Return a path in UTF-8; bytes that are not UTF-8 become backslash escapes."""
    raw = file.path.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace").encode("utf-8")


def _sources(data: DataSection) -> str:
    return clean_text(", ".join(data.sources), 300)


def _nothing_usable(data: DataSection, found: ResolvedSources, bad: BadRecords) -> str:
    """Return the error for sources without a usable document: what was found in them."""
    message = [f"no usable document in {_sources(data)}, files read: {len(found.files):,}"]
    message += [f"  {line}" for line in bad.lines()]
    if FIELD in bad.counts:
        message.append("  hint: data.text_field names the field of a record that holds the text")
    if found.ignored:
        kinds = ", ".join(f"{count:,} x {suffix}" for suffix, count in found.ignored.most_common(8))
        message.append(f"  files without a suffix of text: {kinds}")
        message.append("  hint: a glob reads files whatever their suffix")
    return "\n".join(message)
