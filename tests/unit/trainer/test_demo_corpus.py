"""The corpus of the demonstration: corrupted where it says, the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.corpus import MARKER, WORN, Plan, build, main
from guardrail.core.errors import UsageError
from tests.support.corpora import prepared, section
from tests.support.places import ROOT
from tests.support.texts import numbers_in


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    build(out, Plan())
    return out


def test_the_run_meets_the_stretch_where_the_plan_says(corpus: Path, tmp_path: Path) -> None:
    plan = Plan()
    description = json.loads((corpus / MARKER).read_text())
    damaged = [
        entry["name"]
        for entry in description["corrupted"]
        if not entry["corruption"].endswith(WORN)
    ]
    worn = [
        entry["name"] for entry in description["corrupted"] if entry["corruption"].endswith(WORN)
    ]
    data = section(
        tmp_path,
        sources=(str(corpus),),
        order="stream",
        sequence_length=plan.sequence_length,
        eval_fraction=plan.eval_fraction,
    )
    split = prepared(data).train
    assert len(split) > 1.25 * plan.steps * plan.batch  # room for what is skipped

    def names(sample: int) -> set[str]:
        return {Path(ref.path).name for ref in split.documents(sample)}

    run = plan.steps * plan.batch
    for documents, at, amount in (
        (damaged, plan.at, plan.amount),
        (worn, plan.worn_at, plan.worn_amount),
    ):
        stretch = [sample for sample in range(len(split)) if names(sample) & set(documents)]
        assert stretch == list(range(stretch[0], stretch[-1] + 1))
        assert (at - 0.005) * run < stretch[0] < (at + 0.01) * run
        assert 0.9 * amount * run < len(stretch) < (amount + 0.01) * run
    for entry in description["corrupted"]:
        assert entry["name"] in names(entry["first_sample"] + 1)


def test_corrupted_documents_are_really_corrupted_and_the_others_are_not(corpus: Path) -> None:
    description = json.loads((corpus / MARKER).read_text())
    kinds = {entry["name"]: entry["corruption"] for entry in description["corrupted"]}
    assert {kind.rsplit(" ", 1)[-1] for kind in kinds.values()} == {
        "latin-1",
        "utf-16-le",
        "repeated",
        "wrongly",
    }
    shares = [int(kind.split("%")[0]) for kind in kinds.values() if kind.endswith(WORN)]
    assert shares == sorted(shares) and 10 <= shares[0] < 20 and shares[-1] >= 90
    for file in corpus.glob("*.txt"):
        text = file.read_bytes().decode("utf-8")
        odd = sum(
            not ((character.isprintable() and character.isascii()) or character in "\n\t\f")
            for character in text
        )
        if kinds.get(file.name, "").endswith("repeated"):
            assert len(text) > 2000 and len(set(text.split())) <= 10
        elif kinds.get(file.name, "").endswith(WORN):
            assert odd < 0.3 * len(text), "printable characters, in the wrong places"
        elif file.name in kinds:
            assert odd > 0.3 * len(text)
        else:
            assert odd < 0.3 * len(text)


def test_the_same_plan_gives_the_same_bytes_in_another_process(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    run = subprocess.run(
        [sys.executable, "-m", "demo.corpus", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert run.stdout == f"{out}\n"
    assert "documents, corrupted: " in run.stderr
    assert contents(out) == contents(corpus)


def test_another_seed_gives_another_corpus(corpus: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", Plan(seed=1))
    assert contents(tmp_path / "other") != contents(corpus)


def test_building_again_touches_nothing_and_a_smaller_plan_leaves_no_rest(tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    build(out, Plan(steps=20))
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    build(out, Plan(steps=20))
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    description = build(out, Plan(steps=10, amount=0.0, worn_amount=0.0))
    assert description["corrupted"] == []
    assert len(list(out.glob("*.txt"))) == description["documents"] < len(before) - 1


def test_a_folder_with_anything_else_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0001.txt").write_text("mine")
    with pytest.raises(UsageError, match=f"{tmp_path}/mine "):
        build(tmp_path / "mine", Plan(steps=10))
    out = tmp_path / "corpus"
    build(out, Plan(steps=10))
    (out / "thesis.txt").write_text("mine")
    assert main(["--out", str(out), "--steps", "10"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"{out} " in captured.err and "--out" in captured.err
    assert (out / "thesis.txt").read_text() == "mine"


def test_an_interrupted_build_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import demo.corpus

    write, written = demo.corpus._write, []

    def failing(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 5:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(demo.corpus, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "corpus", Plan(steps=10))
    monkeypatch.undo()
    description = build(tmp_path / "corpus", Plan(steps=10))
    assert len(list((tmp_path / "corpus").glob("*.txt"))) == description["documents"]


def test_options_out_of_range_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path / "c"), "--steps", "0"])
    assert caught.value.code == 2 and numbers_in(capsys.readouterr().err.splitlines()[-1]) == [1, 0]
    assert not (tmp_path / "c").exists()
