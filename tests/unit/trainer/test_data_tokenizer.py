"""BPE and tokenizer.json: trained once, deterministic, and text stays text."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guardrail.core.errors import DataError, Interrupted
from tests.support.corpora import prepared, section, stream, write
from tests.support.places import ROOT
from trainer.data import bpe
from trainer.data.document_reader import DocumentReader
from trainer.data.prepare import prepare_corpus
from trainer.data.progress import Progress
from trainer.data.sources import discover
from trainer.data.tokenizer import PIECE, JsonTokenizer, load_tokenizer, split_text

TEXT = "def f(x):\n    return x + 1  # naïve 日本語\n" * 200


def test_pieces_are_cut_at_line_ends_then_spaces_and_lose_nothing() -> None:
    lines = "".join(f"line {number} of many\n" for number in range(9000))
    words = "word " * PIECE
    solid = "x" * (3 * PIECE + 5)
    spaced = " " + solid
    for text in (lines, words, solid, spaced, "", "short", "\n" * (2 * PIECE)):
        cut = list(split_text(text))
        assert "".join(cut) == text and all(0 < len(piece) <= PIECE for piece in cut)
    assert all(piece.endswith("\n") for piece in split_text(lines))
    assert all(piece.startswith(" word") for piece in list(split_text(words))[1:])


def test_bpe_round_trip_and_use_of_its_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", TEXT)
    corpus = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300))
    assert 260 <= corpus.vocabulary <= 300
    ids = stream(corpus.train)
    assert ids.max() < corpus.vocabulary and len(ids) < len(TEXT.encode()) / 2
    encoded = corpus.tokenizer.encode(TEXT)
    assert corpus.tokenizer.decode(encoded) == TEXT and encoded.dtype == np.uint16
    assert (
        corpus.tokenizer.decode(corpus.tokenizer.encode("\x00\xff ☃ unseen")) == "\x00\xff ☃ unseen"
    )


def test_bpe_is_trained_once_for_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "text" / "a.txt", TEXT)
    first = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300))
    monkeypatch.setattr(bpe, "_train", lambda *_: pytest.fail("trained again"))
    path.rename(tmp_path / "text" / "renamed.txt")
    again = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300, sequence_length=16))
    assert again.tokenizer.identity == first.tokenizer.identity


def test_bpe_training_can_be_stopped(tmp_path: Path) -> None:
    # half a second of work
    write(tmp_path / "text" / "a.txt", "".join(f"token{n * n}\n" for n in range(200_000)))
    training = False

    def progress(text: str, share: float) -> None:
        nonlocal training
        training = training or text == bpe.TRAINING

    with pytest.raises(Interrupted, match=bpe.TRAINING):
        prepare_corpus(section(tmp_path, tokenizer="bpe"), progress=progress, stop=lambda: training)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_share_of_the_text_that_is_trained_on_is_bounded_and_comes_from_everywhere(
    tmp_path: Path,
) -> None:
    for number in range(100):
        write(tmp_path / f"{number:03d}.txt", f"{number} " * 5000)
    found = discover((str(tmp_path),))
    pulse = Progress(lambda text, share: None, lambda: False)
    reader = DocumentReader(found.files, text_field="text", max_bytes=1 << 20, pulse=pulse)
    texts = list(bpe.read_sample(reader, 200_000))
    assert 200_000 - PIECE <= sum(map(len, texts)) <= 200_000 + PIECE
    begins = [int(text.split()[0]) for text in texts]
    assert begins[0] < 20 and begins[-1] > 80 and begins == sorted(begins)
    assert sum(map(len, bpe.read_sample(reader, 1 << 30))) == found.size


def test_training_gives_the_same_tokenizer_in_every_process(tmp_path: Path) -> None:
    write(
        tmp_path / "text" / "a.txt",
        "".join(f"token{n % 97} {n * n % 1009}\n" for n in range(20_000)),
    )
    script = (
        "import sys; from pathlib import Path; from tests.support.corpora import prepared, section\n"
        "print(prepared(section(Path(sys.argv[1]), tokenizer='bpe', cache=sys.argv[2])).fingerprint)"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(tmp_path / f"cache{n}")],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHASHSEED": str(n), "PATH": "", "HOME": str(tmp_path)},
            cwd=ROOT,
        )
        for n in (1, 2)
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert first == second and len(first.strip()) == 64


def test_text_that_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", TEXT + "<|eos|><|pad|>")
    corpus = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300))
    assert np.count_nonzero(stream(corpus.train) == corpus.eos) <= 1
    assert corpus.tokenizer.decode(corpus.tokenizer.encode("a<|eos|>b")) == "a<|eos|>b"


def some_tokenizer(tmp_path: Path) -> Path:
    write(tmp_path / "text" / "a.txt", TEXT)
    corpus = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300))
    return corpus.path / "tokenizer.json"


def test_a_tokenizer_json_is_used_as_it_is(tmp_path: Path) -> None:
    path = some_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    content["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    other = write(
        tmp_path / "other.json",
        json.dumps(content).replace("<|eos|>", "</s>").replace("<|pad|>", "[PAD]"),
    )
    corpus = prepared(section(tmp_path, tokenizer=str(other)))
    trained = prepared(section(tmp_path, tokenizer="bpe", vocabulary=300))
    assert (stream(corpus.train) == stream(trained.train)).all()
    assert (corpus.eos, corpus.pad) == (1, 2)
    other.unlink()
    assert corpus.train.excerpt(0)  # a copy lies in the corpus


def test_a_changed_tokenizer_json_is_another_corpus(tmp_path: Path) -> None:
    path = some_tokenizer(tmp_path)
    other = write(tmp_path / "other.json", path.read_text())
    first = prepared(section(tmp_path, tokenizer=str(other)))
    other.write_text(path.read_text().replace('"<|pad|>"', '"<|nopad|>"'))
    second = prepared(section(tmp_path, tokenizer=str(other)))
    assert second.path != first.path and (first.pad, second.pad) == (2, None)


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path: Path) -> None:
    words = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000, "<unk>": 70_001}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    path = write(tmp_path / "words.json", json.dumps(content))
    numbers = [69_999, 3, 65_536, 65_535, 12, 7, 8, 9]
    write(tmp_path / "text" / "a.txt", " ".join(f"w{n}" for n in numbers))
    corpus = prepared(section(tmp_path, tokenizer=str(path)))
    assert corpus.vocabulary == 70_002
    assert corpus.train.tokens([0])[0].tolist() == [*numbers, 70_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json"),
        ("[1, 2]", "tokenizer.json"),
        (b"\xff", "UTF-8"),
        (None, os.strerror(errno.ENOENT)),
        ("no-eos", "<|eos|>, <|endoftext|>"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    if content == "no-eos":
        content = some_tokenizer(tmp_path).read_text().replace("<|eos|>", "<|end|>")
    if content is not None:
        write(path, content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path, name="x")
    place, _, why = str(caught.value).partition(": ")
    assert place == str(path) and message in why


def test_padding_that_is_the_end_of_text_is_not_ignored() -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[SEP]": 1}, "unk_token": "a"},
    }
    tokenizer = JsonTokenizer(json.dumps(content), name="x", source="x")
    assert (tokenizer.eos, tokenizer.pad, tokenizer.vocabulary) == (1, None, 2)
