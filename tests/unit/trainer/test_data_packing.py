"""Samples are exactly the documents, and know which."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from guardrail.core.errors import DataError
from guardrail.core.records.spans import DocumentRef
from tests.support.corpora import prepared, section, stream, write
from trainer.data import holdout
from trainer.data.corpus import Corpus, Split
from trainer.data.tokenizer import PIECE, ByteTokenizer, Tokenizer

WORDS = "the quick brown fox — naïve 日本語 🦊 jumps\n\nover\tlazy dogs\r\n".split(" ")


def some_text(dice: random.Random, words: int) -> str:
    rare = chr(0x4E00 + dice.randrange(5000))  # several tokens of a small BPE
    return " ".join(dice.choice([*WORDS, rare]) for _ in range(words)).strip() or "x"


def mixed_folder(folder: Path, *, documents: int = 40, seed: int = 0) -> dict[tuple[str, int], str]:
    """Files and JSONL records of very different lengths: (path, record) -> text, in their order."""
    dice = random.Random(seed)
    texts: dict[tuple[str, int], str] = {}
    for number in range(documents):
        text = some_text(dice, dice.choice([1, 1, 2, 5, 40, 400]))
        if number % 4:
            texts[str(write(folder / f"{number:03d}.txt", text)), 0] = text
        else:
            path = folder / f"{number:03d}.jsonl"
            records = [some_text(dice, dice.choice([1, 3, 90])) for _ in range(5)]
            lines = [
                json.dumps({"text": record}, ensure_ascii=dice.random() < 0.5) for record in records
            ]
            write(path, "\n".join(["", *lines]))  # line 1 is blank
            texts |= {(str(path), line): record for line, record in enumerate(records, 2)}
    return texts


def expected_stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    return np.concatenate([np.append(tokenizer.encode(text), tokenizer.eos) for text in texts])


def bytes_of(texts: dict[tuple[str, int], str], ref: DocumentRef) -> bytes:
    return texts[ref.path, ref.record].encode("utf-8")[ref.first_byte : ref.last_byte]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize(
    ("length", "shard_bytes"), [(2, 200), (7, 1000), (64, 1), (7, 1 << 30), (64, 1 << 30)]
)
def test_the_samples_are_the_documents_one_after_another(
    tmp_path: Path, tokenizer: str, length: int, shard_bytes: int
) -> None:
    texts = mixed_folder(tmp_path / "text", documents=12)
    data = section(tmp_path, tokenizer=tokenizer, vocabulary=300, sequence_length=length)
    corpus = prepared(data, shard_bytes=shard_bytes)

    expected = expected_stream(list(texts.values()), corpus.tokenizer)
    got = stream(corpus.train)
    assert (got == expected[: len(got)]).all()
    assert 0 <= len(expected) - len(got) < length  # what does not fill a sample
    assert corpus.report.tokens == len(expected) and corpus.train.token_count == len(got)
    shards = list(corpus.path.glob("train-*.bin"))
    assert len(shards) == (
        1
        if shard_bytes == 1 << 30
        else -(-len(corpus.train) // max(1, shard_bytes // (2 * length)))
    )
    assert all(shard.stat().st_size <= max(shard_bytes, 2 * length) + 2 for shard in shards)


@pytest.mark.parametrize("length", [2, 7, 64])
def test_documents_name_the_bytes_of_a_sample(tmp_path: Path, length: int) -> None:
    texts = mixed_folder(tmp_path / "text")
    corpus = prepared(section(tmp_path, sequence_length=length), shard_bytes=999)
    for sample in range(len(corpus.train)):
        tokens = corpus.train.tokens([sample])[0]
        refs = corpus.train.documents(sample)
        named = b"".join(bytes_of(texts, ref) for ref in refs)
        assert bytes(tokens[tokens < 256].astype(np.uint8)) == named
        assert len({(ref.path, ref.record) for ref in refs}) == len(refs)


def test_documents_of_a_bpe_sample_cover_its_text(tmp_path: Path) -> None:
    texts = mixed_folder(tmp_path / "text")
    corpus = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300, sequence_length=16))
    split = 0
    for sample in range(len(corpus.train)):
        ids = corpus.train.tokens([sample])[0]
        parts = np.split(ids, np.flatnonzero(ids == corpus.eos) + 1)
        decoded = [
            t for t in (corpus.tokenizer.decode(part[part != corpus.eos]) for part in parts) if t
        ]
        refs = corpus.train.documents(sample)
        assert len(refs) == len(decoded)
        for ref, text in zip(refs, decoded, strict=True):
            named = bytes_of(texts, ref).decode("utf-8")
            # A token may be a part of a character; the range covers the whole character.
            if "\ufffd" in text:
                split += 1
                assert text.strip("\ufffd") in named and len(named) <= len(text)
            else:
                assert named == text
    assert split  # the text has characters of several tokens, and some were cut


def test_a_document_longer_than_a_piece_keeps_its_byte_ranges(tmp_path: Path) -> None:
    text = some_text(random.Random(1), 30_000)
    assert len(text) > 3 * PIECE
    path = str(write(tmp_path / "text" / "long.txt", text))
    for tokenizer in ("bytes", "bpe"):
        corpus = prepared(
            section(tmp_path, tokenizer=tokenizer, vocabulary=2000, sequence_length=50)
        )
        for sample in range(0, len(corpus.train), 97):
            (ref,) = corpus.train.documents(sample)
            decoded = corpus.tokenizer.decode(corpus.train.tokens([sample])[0])
            assert ref.path == path
            named = text.encode()[ref.first_byte : ref.last_byte].decode("utf-8", "replace")
            assert decoded.strip("\ufffd") in named and abs(len(named) - len(decoded)) <= 2


def test_touching_stretches_of_many_samples_are_joined(tmp_path: Path) -> None:
    texts = mixed_folder(tmp_path / "text")
    corpus = prepared(section(tmp_path))
    everything, total = corpus.train.documents_of(range(len(corpus.train)), limit=None)
    assert total == len(everything) >= len(texts) - 1
    assert all(
        bytes_of(texts, ref).decode() == texts[ref.path, ref.record] for ref in everything[:-1]
    )
    few, again = corpus.train.documents_of(range(len(corpus.train)), limit=3)
    assert few == everything[:3] and again == total
    apart, count = corpus.train.documents_of([5, 3, 3, 40])
    assert count == len(apart) >= 2 and apart[0] == corpus.train.documents(3)[0]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_an_excerpt_is_what_the_model_met_even_when_the_source_is_gone(
    tmp_path: Path, tokenizer: str
) -> None:
    texts = mixed_folder(tmp_path / "text")
    corpus = prepared(section(tmp_path, tokenizer=tokenizer, vocabulary=300, sequence_length=16))
    for path, _ in texts:
        Path(path).unlink(missing_ok=True)
    for sample in range(0, len(corpus.train), 7):
        for ref in corpus.train.documents(sample):
            named = " ".join(bytes_of(texts, ref).decode("utf-8", "replace").split())
            shown = " ".join(corpus.train.excerpt(ref, 1000).split())
            assert shown.strip("\ufffd") in named and len(named) - len(shown.strip("\ufffd")) <= 6
        assert len(corpus.train.excerpt(sample, 5)) <= 5
    with pytest.raises(KeyError):
        corpus.train.excerpt(DocumentRef(path="elsewhere", last_byte=5))
    with pytest.raises(KeyError):
        corpus.train.excerpt(DocumentRef(path=next(iter(texts))[0], record=999, last_byte=5))


def test_the_label_behind_the_last_sample_has_an_excerpt_too(tmp_path: Path) -> None:
    # with its end of text one sample of eight tokens
    write(tmp_path / "text" / "a.txt", "seven ch"[:7])
    # one token of it is the last label; what follows is dropped
    write(tmp_path / "text" / "b.txt", "bcd")
    corpus = prepared(section(tmp_path))
    assert len(corpus.train) == 1
    first, second = corpus.train.documents(0)
    assert (corpus.train.excerpt(first), corpus.train.excerpt(second)) == ("seven c", "b")


def test_an_excerpt_cannot_reach_the_terminal(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "before\x1b]52;c;aGk=\x07\x1b[2Jafter\x00\x9b31m and more")
    corpus = prepared(section(tmp_path))
    (ref,), _ = corpus.train.documents_of(range(len(corpus.train)))
    assert corpus.train.excerpt(ref) == "beforeafter and more"[: len(corpus.train.excerpt(ref))]
    assert corpus.train.excerpt(ref, 9) == "beforeaf…"


def test_a_file_name_that_is_no_utf8_is_named_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with open(bytes(tmp_path / "text") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"some text of some length")
    corpus = prepared(section(tmp_path))
    (ref,) = corpus.train.documents(0)
    assert ref.path.endswith("/caf\\xe9.txt")
    assert corpus.train.excerpt(ref) == "some text"


def test_samples_outside_the_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "some text of some length")
    corpus = prepared(section(tmp_path))
    for sample in (-1, len(corpus.train)):
        with pytest.raises(IndexError):
            corpus.train.tokens([0, sample])
        with pytest.raises(IndexError):
            corpus.train.documents(sample)
    assert corpus.train.tokens([]).shape == (0, 9) and len(corpus.eval) == 0


def documents_in(split: Split) -> set[tuple[str, int]]:
    refs, _ = split.documents_of(range(len(split)), limit=None)
    return {(ref.path, ref.record) for ref in refs}


def held_out(
    folder: Path, corpus: Corpus, texts: dict[tuple[str, int], str], fraction: float
) -> None:
    limit = holdout.hash_threshold(fraction)
    expected = {
        o for o in texts if holdout.origin_hash(str(Path(o[0]).relative_to(folder)), o[1]) < limit
    }
    assert corpus.eval.document_count == len(expected)
    assert corpus.train.document_count == len(texts) - len(expected)
    assert documents_in(corpus.eval) <= expected
    assert not documents_in(corpus.train) & expected


def test_documents_are_held_out_by_the_hash_of_their_origin(tmp_path: Path) -> None:
    texts = mixed_folder(tmp_path / "text", documents=200)
    for fraction in (0.1, 0.5):
        corpus = prepared(section(tmp_path, eval_fraction=fraction, sequence_length=4))
        held_out(tmp_path / "text", corpus, texts, fraction)
        assert 0.6 * fraction < corpus.eval.document_count / len(texts) < 1.5 * fraction
    moved = tmp_path / "elsewhere"
    mixed_folder(moved / "text", documents=200)
    again = prepared(section(moved, eval_fraction=0.5, sequence_length=4))
    assert again.fingerprint == corpus.fingerprint and again.path != corpus.path


@pytest.mark.parametrize("fraction", [1e-9, 0.3, 0.999])
@pytest.mark.parametrize("documents", [2, 3, 5])
def test_neither_split_is_empty_when_there_are_two_documents(
    tmp_path: Path, fraction: float, documents: int
) -> None:
    for number in range(documents):
        write(tmp_path / "text" / f"{number}.txt", f"{number} some text of some length")
    corpus = prepared(section(tmp_path, eval_fraction=fraction))
    assert len(corpus.train) and len(corpus.eval)
    assert corpus.train.document_count + corpus.eval.document_count == documents
    assert corpus.report.documents == documents


def test_more_documents_are_held_out_until_they_fill_a_sample(tmp_path: Path) -> None:
    for number in range(300):
        write(tmp_path / "text" / f"{number}.txt", f"{number}")
    corpus = prepared(section(tmp_path, eval_fraction=0.004, sequence_length=40))
    assert len(corpus.eval) == 1 and corpus.eval.document_count > 8


def test_a_single_document_is_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "some text of some length")
    corpus = prepared(section(tmp_path, eval_fraction=0.999))
    assert len(corpus.train) == 3 and len(corpus.eval) == 0


def test_training_comes_first_when_there_is_one_sample_in_all(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "1234")
    write(tmp_path / "text" / "b.txt", "56789abc")
    for fraction in (0.01, 0.999):
        try:
            corpus = prepared(section(tmp_path, eval_fraction=fraction))
        except DataError:
            # The longer document has the smaller hash, and one has to be held out.
            hashes = [holdout.origin_hash(name, 0) for name in ("a.txt", "b.txt")]
            assert hashes[1] < hashes[0]
        else:
            assert (
                len(corpus.train) == 1 and len(corpus.eval) == 0 and corpus.eval.document_count == 1
            )


@pytest.mark.parametrize(
    ("tokens", "limit", "held"),
    [
        ([10, 10, 10, 10], 0, 1),
        ([4, 4, 10, 10], 0, 3),  # two do not fill a sample of 9, three do
        ([4, 4, 4, 10], 0, 3),
        ([4, 4, 4, 4], 0, 1),  # nothing fills both
        ([10, 10, 10, 10], 1 << 64, 3),
        ([10, 10, 4, 4], 1 << 64, 1),  # given back until training has a sample
        ([10], 1 << 64, 0),
    ],
)
def test_balance_of_the_splits(tokens: list[int], limit: int, held: int) -> None:
    hashes = np.array([5, 6, 7, (1 << 64) - 1], dtype=np.uint64)[: len(tokens)]
    chosen = holdout.balance_splits(hashes, np.array(tokens), limit, sample=9)
    assert sum(int(value) < chosen for value in hashes) == held


def test_the_byte_tokenizer_is_the_bytes() -> None:
    tokenizer = ByteTokenizer()
    text = "naïve 日本語\x00" + "x" * (3 * PIECE)
    assert bytes(tokenizer.encode(text).astype(np.uint8)) == text.encode()
    assert tokenizer.decode(np.append(tokenizer.encode(text), [256, 257, 258])) == text
    assert tokenizer.encode("").tolist() == []
