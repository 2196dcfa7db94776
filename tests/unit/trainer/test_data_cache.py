"""The cache: reused, waited for, never half-built, rebuilt when damaged."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guardrail.core.errors import DataError, Interrupted
from tests.support.corpora import prepared, section, stream, write
from tests.support.places import ROOT
from trainer.config.sections import DataSection
from trainer.data import build
from trainer.data import prepare as preparing
from trainer.data.corpus import Corpus, inspect_corpus
from trainer.data.prepare import (
    WAITING_FOR_CORPUS,
    WAITING_TO_BUILD,
    cache_folder,
    prepare_corpus,
    wait_for_corpus,
)
from trainer.data.progress import LOOKING

SCRIPT = """
import os, sys
from pathlib import Path
from tests.support.corpora import section
from trainer.data.build import Builder
from trainer.data.prepare import prepare

build = Builder.build
def counted(self, **options):
    with open(sys.argv[2], "a") as log:
        log.write(f"{os.getpid()}\\n")
    build(self, **options)
Builder.build = counted
print(prepare(section(Path(sys.argv[1])), progress=lambda text, share: None, stop=lambda: False))
"""


def quiet(text: str, share: float) -> None:
    pass


def never() -> bool:
    return False


def text_of(folder: Path, *, size: int = 1000) -> Path:
    return write(folder / "text" / "a.txt", "some text of some length\n" * size)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the reason of every build."""
    reasons: list[str] = []
    original: Callable[..., None] = build.Builder.build

    def counted(self: build.Builder, *, rebuilt: str) -> None:
        reasons.append(rebuilt)
        original(self, rebuilt=rebuilt)

    monkeypatch.setattr(build.Builder, "build", counted)
    return reasons


def test_a_corpus_is_built_once(tmp_path: Path, builds: list[str]) -> None:
    text_of(tmp_path)
    first = prepared(section(tmp_path))
    assert prepared(section(tmp_path)).path == first.path
    assert builds == [""]
    assert (first.path.stat().st_mode & 0o777, first.path.parent.stat().st_mode & 0o777) == (
        0o700,
        0o700,
    )
    assert wait_for_corpus(section(tmp_path), stop=never, seconds=0) == first.path


@pytest.mark.parametrize(
    "change",
    [
        "size",
        "time",
        "name",
        "another",
        "sequence_length",
        "tokenizer",
        "eval_fraction",
        "text_field",
        "limit",
    ],
)
def test_whatever_changes_the_corpus_is_another_entry(
    tmp_path: Path, builds: list[str], change: str
) -> None:
    path = text_of(tmp_path)
    first = prepared(section(tmp_path))
    data = section(tmp_path)
    if change == "size":
        path.write_text(path.read_text() + "more")
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "name":
        path.rename(path.with_name("b.txt"))
    elif change == "another":
        write(path.with_name("b.txt"), "more")
    else:
        values = {
            "sequence_length": 9,
            "tokenizer": "bpe",
            "eval_fraction": 0.1,
            "text_field": "body",
        }
        key = "max_document_bytes" if change == "limit" else change
        data = section(tmp_path, **{key: values.get(change, 1 << 25)})
    assert prepared(data).path != first.path
    assert builds == ["", ""]


def test_the_order_of_the_run_is_no_part_of_the_corpus(tmp_path: Path, builds: list[str]) -> None:
    text_of(tmp_path)
    prepared(section(tmp_path))
    prepared(section(tmp_path, order="stream", seed=5))
    assert builds == [""]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    path = text_of(tmp_path)
    first = prepared(section(tmp_path))
    path.rename(path.with_name("b.txt"))
    same = prepared(section(tmp_path))
    assert same.fingerprint == first.fingerprint and len(first.fingerprint) == 64
    path.with_name("b.txt").write_text(
        path.with_name("b.txt").read_text().replace("text", "TEXT", 1)
    )
    assert prepared(section(tmp_path)).fingerprint != first.fingerprint
    assert prepared(section(tmp_path, sequence_length=9)).fingerprint != first.fingerprint


def damage_truncate(folder: Path) -> str:
    file = folder / "train-00000.bin"
    os.truncate(file, file.stat().st_size - 1)
    return "train-00000.bin has 50,001 bytes instead of 50,002"


def damage_delete(folder: Path) -> str:
    (folder / "train-cut.idx").unlink()
    return "train-cut.idx: No such file or directory"


def damage_index(folder: Path) -> str:
    (folder / "corpus.json").write_text("{")
    return "corpus.json: Input data was truncated"


def damage_format(folder: Path) -> str:
    file = folder / "corpus.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 0'))
    return "format 0 instead of 1"


def damage_no_index(folder: Path) -> str:
    (folder / "corpus.json").unlink()
    return "no corpus.json"


DAMAGES = [damage_truncate, damage_delete, damage_index, damage_format, damage_no_index]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_built_again_with_one_line(
    tmp_path: Path,
    builds: list[str],
    damage: Callable[[Path], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    text_of(tmp_path)
    first = prepared(section(tmp_path))
    tokens = stream(first.train)
    reason = damage(first.path)

    with pytest.raises(DataError) as caught:
        Corpus.open(first.path)
    assert str(first.path) in str(caught.value) and f"({reason})" in str(caught.value)

    again = prepared(section(tmp_path))
    assert (stream(again.train) == tokens).all() and again.fingerprint == first.fingerprint
    assert builds == ["", reason] and again.report.rebuilt == reason
    assert again.report.lines()[-1] == f"tokenised again: {reason}"
    (line,) = capfd.readouterr().err.splitlines()
    assert str(first.path) in line and f"({reason})" in line


def test_a_corpus_that_is_open_survives_its_rebuilding(tmp_path: Path) -> None:
    text_of(tmp_path)
    first = prepared(section(tmp_path))
    before = first.train.tokens([0, 1])
    (first.path / "corpus.json").unlink()
    prepared(section(tmp_path))
    assert (first.train.tokens([0, 1]) == before).all()


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    text_of(tmp_path, size=100_000)
    log = tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(log)]
    root = ROOT
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)
    ]
    paths = {run.communicate(timeout=60)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0] * 4
    assert len(paths) == 1 and len(log.read_text().splitlines()) == 1
    assert Corpus.open(paths.pop()).report.documents == 1


def test_a_builder_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    text_of(tmp_path, size=1000)
    script = SCRIPT.replace(
        "build(self, **options)", "(self.folder / 'train-00000.bin').touch(); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", "import time\n" + script, str(tmp_path), str(tmp_path / "log")],
        cwd=ROOT,
    )
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("*.tmp-*/train-00000.bin")):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()

    with pytest.raises(DataError, match=r" 0 s\n.*launch\.setup_timeout") as caught:
        wait_for_corpus(section(tmp_path), stop=never, seconds=0)
    corpus = prepared(section(tmp_path))
    shutil.copytree(corpus.path, tmp_path / "kept")
    shutil.rmtree(corpus.path)
    nothing, why = inspect_corpus(corpus.path)
    assert nothing is None and f"{corpus.path} ({why})" in str(caught.value)
    (tmp_path / "kept").rename(corpus.path)
    assert len(corpus.train) and not list((tmp_path / "cache").glob("*.tmp-*"))


def test_who_waits_for_the_lock_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    text_of(tmp_path)
    name = prepared(section(tmp_path)).path.name
    other = tmp_path / "other"
    other.mkdir()
    said: list[str] = []
    with open(other / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Interrupted, match=WAITING_TO_BUILD):
            prepare_corpus(
                section(tmp_path, cache=str(other)),
                progress=lambda text, share: said.append(text),
                stop=lambda: WAITING_TO_BUILD in said,
            )
    assert said[-1] == WAITING_TO_BUILD
    assert prepared(section(tmp_path, cache=str(other))).path.name == name


def test_a_rank_that_waits_gets_the_corpus_when_it_is_there(tmp_path: Path) -> None:
    text_of(tmp_path)
    paths: list[Path] = []
    thread = threading.Thread(
        target=lambda: paths.append(wait_for_corpus(section(tmp_path), stop=never, seconds=60)),
        daemon=True,
    )
    thread.start()
    path = prepare_corpus(section(tmp_path), progress=quiet, stop=never)
    thread.join(60)
    assert paths == [path]


def test_a_rank_that_waits_can_be_stopped(tmp_path: Path) -> None:
    text_of(tmp_path)
    with pytest.raises(Interrupted, match=WAITING_FOR_CORPUS):
        wait_for_corpus(section(tmp_path), stop=lambda: True, seconds=60)


def test_a_stop_ends_the_work_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "text" / "a.txt", "some text of some length\n" * 1_000_000)
    polls = 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return polls > 5

    with pytest.raises(Interrupted, match="tokenizing"):
        prepare_corpus(section(tmp_path), progress=quiet, stop=stop)
    assert polls == 6
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_progress_grows_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.progress.REPORT_SECONDS", 0.0)
    for number in range(20):
        write(tmp_path / "text" / f"{number}.txt", "some text of some length\n" * 1000)
    seen: list[tuple[str, float]] = []
    prepare_corpus(
        section(tmp_path), progress=lambda text, share: seen.append((text, share)), stop=never
    )
    shares = [share for text, share in seen if text == "tokenizing"]
    assert shares == sorted(shares) and shares[0] == 0.0 and 0.9 < shares[-1] <= 1.0
    assert seen[0][0] == LOOKING and len(shares) >= 20


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(DataSection(cache="~/c")) == tmp_path / "c"
    assert cache_folder(DataSection()) == tmp_path / "xdg" / "guardrail"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataSection()) == tmp_path / ".cache" / "guardrail"


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    text_of(tmp_path)
    write(tmp_path / "file", "")
    with pytest.raises(DataError) as caught:
        prepared(section(tmp_path, cache=str(tmp_path / "file" / "cache")))
    cache = f"{tmp_path}/file/cache"
    assert f"{cache}: Not a directory" in str(caught.value) and "data.cache" in str(caught.value)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_of(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparing, "sync_folder", full)
    with pytest.raises(DataError, match=os.strerror(errno.ENOSPC)):
        prepared(section(tmp_path))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_opening_reads_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        write(tmp_path / "text" / f"{number}.txt", "some text of some length\n" * 100)
    path = prepared(section(tmp_path), shard_bytes=1 << 14).path
    read: list[str] = []
    monkeypatch.setattr(
        "trainer.data.corpus._mapped", lambda folder, entry, dtype: read.append(entry.name)
    )
    small = [file for file in path.iterdir() if file.suffix == ".json"]
    assert sum(file.stat().st_size for file in small) < 8000
    corpus = Corpus.open(path)
    assert len(corpus.train) > 10_000 and read == []


def test_the_built_in_corpus_is_the_same_in_two_interpreters(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.support.corpora import prepared, section\n"
        "corpus = prepared(section(Path(sys.argv[1]), sources=('builtin:python',), sequence_length=128))\n"
        "print(corpus.fingerprint, corpus.report.bytes, corpus.report.documents, corpus.report.bad)"
    )
    outputs = []
    for number in (1, 2):
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "LC_ALL": "C"}
        command = [sys.executable, "-c", script, str(tmp_path / str(number))]
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
            check=True,
        )
        outputs.append(run.stdout.split(maxsplit=3))
    assert outputs[0] == outputs[1]
    fingerprint, size, documents, bad = outputs[0]
    assert (
        len(fingerprint) == 64
        and int(size) > 5_000_000
        and int(documents) > 300
        and bad.strip() == "{}"
    )
