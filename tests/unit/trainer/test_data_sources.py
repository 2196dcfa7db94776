"""Which files are found, which records are refused, and what is said about them."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from guardrail.core.errors import DataError
from tests.support.corpora import prepared, section, stream, write
from tests.support.places import ROOT
from tests.support.texts import numbers_in
from trainer.data.document_reader import DocumentReader
from trainer.data.progress import Progress
from trainer.data.sources import discover
from trainer.sources import bad_records

GOOD = "a good document, long enough for a sample"


def lines(*records: object) -> bytes:
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)


def read(folder: Path, *sources: str, max_bytes: int = 1 << 20) -> tuple[list[str], DocumentReader]:
    found = discover(sources or (str(folder),))
    pulse = Progress(lambda text, share: None, lambda: False)
    reader = DocumentReader(found.files, text_field="text", max_bytes=max_bytes, pulse=pulse)
    return [document.text for document in reader], reader


ZST = zstandard.ZstdCompressor(write_checksum=True).compress(os.urandom(5000).hex().encode())
GZ = gzip.compress(os.urandom(5000).hex().encode())

# file name -> content, kind, what the message names
BAD = {
    "latin1.txt": (
        b"caf\xe9 au lait",
        bad_records.ENCODING,
        "byte 0xe9 at 3: invalid continuation byte",
    ),
    "empty.txt": (b"", bad_records.EMPTY, "empty.txt"),
    "blank.txt": (b" \n\t\n", bad_records.EMPTY, "blank.txt"),
    "large.txt": (
        b"x" * 20_001,
        bad_records.LARGE,
        "20,001 bytes, data.max_document_bytes is 20,000",
    ),
    "bomb.txt.zst": (
        zstandard.ZstdCompressor().compress(b"x" * 3_000_000),
        bad_records.LARGE,
        "data.max_document_bytes, 20,000",
    ),
    "cut.txt.gz": (GZ[:-20], bad_records.ARCHIVE, "ended before the end-of-stream marker"),
    "cut.txt.zst": (ZST[:-20], bad_records.ARCHIVE, "ended before the end-of-stream marker"),
    "header.txt.zst": (ZST[:3], bad_records.ARCHIVE, "ended before the end-of-stream marker"),
    "flipped.txt.gz": (GZ[:-6] + b"\0\0" + GZ[-4:], bad_records.ARCHIVE, "CRC check failed"),
    "flipped.txt.zst": (ZST[:-2] + b"\0\0", bad_records.ARCHIVE, "checksum"),
    "no-gzip.txt.gz": (b"plain text", bad_records.ARCHIVE, "Not a gzipped file"),
    "no-zstd.txt.zst": (b"plain text", bad_records.ARCHIVE, "frame descriptor"),
    "broken.jsonl": (
        b'{"text": "a" "b"}',
        bad_records.JSON,
        "broken.jsonl:1 (column 14: Expecting ',' delimiter)",
    ),
    "halved.jsonl": (
        b'{"text": "a',
        bad_records.JSON,
        "column 10: Unterminated string starting at",
    ),
    "deep.jsonl": (b"[" * 15_000, bad_records.JSON, "recursion"),
    "bytes.jsonl": (
        b'{"text": "\xff"}',
        bad_records.ENCODING,
        "byte 0xff at 10: invalid start byte",
    ),
    "surrogate.jsonl": (
        b'{"text": "ab\\ud800"}',
        bad_records.ENCODING,
        " character 2",
    ),
    "missing.jsonl": (
        lines({"body": "a", "id": 1}),
        bad_records.FIELD,
        "body, id",
    ),
    "number.jsonl": (
        lines({"text": 5}),
        bad_records.FIELD,
        "'text' is a number",
    ),
    "null.jsonl": (lines({"text": None}), bad_records.FIELD, "'text' is null"),
    "list.jsonl": (lines(["text"]), bad_records.FIELD, "a list "),
    "nothing.jsonl": (lines({"text": ""}), bad_records.EMPTY, "nothing.jsonl:1"),
    "long.jsonl": (
        lines({"text": "x" * 20_000}),
        bad_records.LARGE,
        "data.max_document_bytes, 20,000)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_counted_and_named_and_not_fatal(tmp_path: Path, name: str) -> None:
    content, kind, message = BAD[name]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    write(tmp_path / "text" / "good.txt", GOOD)

    report = prepared(section(tmp_path, max_document_bytes=20_000)).report

    assert report.documents == 1
    assert report.bad == {kind: 1}
    (named,) = report.named[kind]
    assert str(tmp_path / "text" / name) in named and message in named
    assert sum(line.endswith(f"1 x {kind}: {named}") for line in report.lines()) == 1


@pytest.mark.parametrize("name", BAD)
def test_when_bad_records_are_all_there_is_the_error_names_them(tmp_path: Path, name: str) -> None:
    content, kind, message = BAD[name]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)

    with pytest.raises(DataError) as caught:
        prepared(section(tmp_path, max_document_bytes=20_000))

    first, second, *_ = str(caught.value).splitlines()
    assert str(tmp_path / "text") in first and first.endswith(" 1")
    assert second.startswith(f"  1 x {kind}: ")
    assert message in str(caught.value)


def test_good_records_around_bad_ones_are_used(tmp_path: Path) -> None:
    content = lines(
        {"text": "one"}, b"{", b"", {"text": "x" * 30_000}, {"no": 1}, {"text": "sechs"}
    )
    write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + content + b"\n")
    texts, reader = read(tmp_path, max_bytes=20_000)
    assert texts == ["one", "sechs"]
    assert reader.bad.counts == {bad_records.JSON: 1, bad_records.LARGE: 1, bad_records.FIELD: 1}
    # the blank line counts as a line, not as a record
    assert ":5 (" in reader.bad.named[bad_records.FIELD][0]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_records_before_the_end_of_a_truncated_archive_are_used(
    tmp_path: Path, suffix: str
) -> None:
    texts = [os.urandom(100).hex() for _ in range(5000)]
    whole = write(tmp_path / f"a.jsonl.{suffix}", lines(*({"text": text} for text in texts)))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found, reader = read(tmp_path)
    assert 1500 < len(found) < 3000 and found == texts[: len(found)]
    assert reader.bad.counts == {bad_records.ARCHIVE: 1}


def test_no_more_than_five_of_a_kind_are_named(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.jsonl", lines(*[b"{"] * 12, {"text": GOOD}))
    report = prepared(section(tmp_path)).report
    assert report.bad == {bad_records.JSON: 12} and len(report.named[bad_records.JSON]) == 5
    assert report.lines()[-1].endswith("and 7 more")


def test_escape_sequences_in_a_file_name_do_not_reach_the_report(tmp_path: Path) -> None:
    write(tmp_path / "text" / "evil\x1b]52;c;aGk=\x07.txt", b"\xff")
    write(tmp_path / "text" / "good.txt", GOOD)
    (named,) = prepared(section(tmp_path)).report.named[bad_records.ENCODING]
    assert named.isprintable()


@pytest.mark.parametrize(
    "name", ["huge.txt", "huge.txt.gz", "huge.txt.zst", "huge.jsonl", "huge.jsonl.zst"]
)
def test_a_document_of_200_mb_is_never_held_whole(tmp_path: Path, name: str) -> None:
    size = 200 * 1024 * 1024
    path = tmp_path / name
    record = b'{"text": "'
    if name == "huge.txt":
        path.touch()
        os.truncate(path, size)
    elif name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as packed:
            for _ in range(size >> 20):
                packed.write(b"x" * (1 << 20))
    elif name.endswith(".zst"):
        with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as packed:
            packed.write(record)
            for _ in range(size >> 20):
                packed.write(b"x" * (1 << 20))
            packed.write(b'"}\n')
    else:
        with open(path, "wb") as raw:
            raw.write(record)
            for _ in range(size >> 20):
                raw.write(b"x" * (1 << 20))
            raw.write(b'"}\n')
    write(tmp_path / "z.txt", GOOD)
    tracemalloc.start()
    try:
        texts, reader = read(tmp_path, max_bytes=4 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == [GOOD] and reader.bad.counts == {bad_records.LARGE: 1}
    assert peak < 80 << 20


def test_folder_glob_and_file_in_order_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a/2.md", "a/10.md", "c.bin", ".hidden.txt", ".git/x.txt", "d.weird"):
        write(tmp_path / name, name)
    assert read(tmp_path)[0] == ["a/10.md", "a/2.md", "b.txt"]
    found = discover((str(tmp_path / "d.*"), str(tmp_path), str(tmp_path / "**" / "*.txt")))
    assert [file.key for file in found.files] == ["d.weird", "a/10.md", "a/2.md", "b.txt"]
    assert found.ignored == {".bin": 1, ".weird": 1}


def test_a_name_with_glob_characters_is_a_name_if_it_exists(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", "brackets")
    assert read(tmp_path, str(tmp_path / "a[1].txt"))[0] == ["brackets"]


def test_the_name_below_the_source_is_the_same_wherever_the_source_lies(tmp_path: Path) -> None:
    for place in ("here", "over/there"):
        write(tmp_path / place / "sub" / "a.txt", "a")
    sources = ("here", "here/*", "here/sub/*.txt", "here/sub/a.txt", "over/there")
    keys = [discover((str(tmp_path / source),)).files[0].key for source in sources]
    assert keys == ["sub/a.txt", "sub/a.txt", "a.txt", "a.txt", "sub/a.txt"]


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c"):
        write(tmp_path / "text" / name, b"x")
    with pytest.raises(DataError, match=r"2 x \.png, 1 x ") as caught:
        prepared(section(tmp_path))
    assert " glob " in str(caught.value).splitlines()[-1]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "text" / "good.txt", GOOD)
    (tmp_path / "text" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "text" / "pipe.txt")
    report = prepared(section(tmp_path)).report
    assert report.bad == {bad_records.UNREADABLE: 2}
    assert f"dangling.txt ({os.strerror(errno.ENOENT)})" in report.named[bad_records.UNREADABLE][0]
    assert "pipe.txt (" in report.named[bad_records.UNREADABLE][1]


def test_a_file_that_becomes_a_pipe_after_it_was_found_does_not_hang(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", GOOD)
    found = discover((str(tmp_path),))
    path.unlink()
    os.mkfifo(path)
    reader = DocumentReader(
        found.files,
        text_field="text",
        max_bytes=1000,
        pulse=Progress(lambda t, s: None, lambda: False),
    )
    assert list(reader) == [] and reader.bad.counts == {bad_records.UNREADABLE: 1}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_text_gives_the_same_tokens(tmp_path: Path, suffix: str) -> None:
    text = "naïve — 日本語\n" * 5000
    plain = prepared(section(tmp_path, sources=(str(write(tmp_path / "p" / "a.txt", text)),)))
    packed = prepared(
        section(tmp_path, sources=(str(write(tmp_path / "q" / f"a.txt{suffix}", text)),))
    )
    assert packed.fingerprint == plain.fingerprint
    records = write(tmp_path / "r" / f"a.jsonl{suffix}", lines({"body": text}) + b"\n")
    corpus = prepared(section(tmp_path, sources=(str(records),), text_field="body"))
    assert (stream(corpus.train) == stream(plain.train)).all()


def test_zstd_frames_one_after_another_are_one_text(tmp_path: Path) -> None:
    frames = [
        zstandard.ZstdCompressor().compress(part.encode() * 3000)
        for part in ("one ", "two ", "three ")
    ]
    write(tmp_path / "a.bin", b"").with_name("a.txt.zst").write_bytes(b"".join(frames))
    assert read(tmp_path)[0] == ["one " * 3000 + "two " * 3000 + "three " * 3000]


def test_text_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "12345678")
    assert len(prepared(section(tmp_path)).train) == 1  # nine tokens with the EOS
    with pytest.raises(DataError, match=r"data\.sequence_length") as caught:
        prepared(section(tmp_path, sequence_length=9))
    assert numbers_in(str(caught.value)) == [9, 1, 10], "tokens, and tokens of one sample"


def test_byte_level_data_loads_neither_torch_nor_tokenizers_nor_zstandard() -> None:
    script = (
        "import sys, trainer.data.prepare, trainer.data.loader\n"
        "print(sorted({'torch', 'accelerate', 'tokenizers', 'zstandard', 'textual'} & set(sys.modules)))"
    )
    root = ROOT
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True
    )
    assert run.stdout == "[]\n"


@pytest.mark.fault("E16")
def test_an_empty_source_is_named_and_refused_only_where_all_are(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", GOOD)
    write(tmp_path / "binary" / "weights.bin", b"x")
    write(tmp_path / "blank" / "a.txt", " ")
    (tmp_path / "bare").mkdir()
    names = ("bare", "binary", "blank", "text/*.none")
    first = prepared(section(tmp_path))
    assert first.report.bad == {}
    everything = (str(tmp_path / "text"), *(str(tmp_path / name) for name in names))
    told = "\n".join(prepared(section(tmp_path, sources=everything)).report.lines())
    assert f"3 x {bad_records.NO_FILE}" in told and f"1 x {bad_records.NO_TEXT}" in told
    for name in names:
        assert str(tmp_path / name) in told
    assert f"{tmp_path}/binary (1 files" in told
    # Its files are those of the first: a corpus in the cache must not hide that a source is empty.
    told = "\n".join(prepared(section(tmp_path, sources=everything[:2])).report.lines())
    assert f"1 x {bad_records.NO_FILE}: {tmp_path}/bare" in told
    with pytest.raises(DataError, match=f"3 x {bad_records.NO_FILE}") as caught:
        prepared(section(tmp_path, sources=everything[1:]))
    assert all(str(tmp_path / name) in str(caught.value) for name in names)
