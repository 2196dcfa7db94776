"""Corrupted documents are found in their batches and nothing else is left out; exactly, on any
number of ranks.
"""

import random
from pathlib import Path

import pytest

from guardrail.report.text_quality import UNLIKE_CORPUS
from guardrail.rundir.run_directory import RunDirectory
from tests.support.running import (
    BATCH,
    SHAPES,
    assert_same,
    corpus_of,
    of_kind,
    others_slow,
    spans,
    tiny,
    told,
    trained,
    write_corpus,
)
from trainer.config.config import Config

KINDS = ("binary", "repetition", "language", "shuffled", "letters")
LENGTH = 64  # of a sample and, with its end, of a document: each document is one sample
DOCUMENTS, PLANTED = 420, 10


def read_real_text(folder: Path) -> str:
    """Return 8000 characters of real text."""
    write_corpus(folder / "whole", documents=8)
    files = sorted((folder / "whole").iterdir())
    return "".join(file.read_text(encoding="utf-8") for file in files)


def plant(folder: Path) -> set[str]:
    """Real text in eight pieces, over and over, and ten documents of mis-decoded noise; returns the
    names of these.
    """
    text = read_real_text(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    dice = random.Random(1)
    bad = set(dice.sample(range(270, 390), PLANTED))
    for number in range(DOCUMENTS):
        start = number % 8 * LENGTH
        noise = bytes(dice.randrange(0xA0, 0x100) for _ in range(31)).decode("latin-1") + "x"
        content = noise if number in bad else text[start : start + LENGTH - 1]
        (corpus / f"{number:04d}.txt").write_text(content, encoding="utf-8")
    return {f"{number:04d}.txt" for number in bad}


def spoiled(kind: str, clean: str, dice: random.Random) -> str:
    """Text of as many bytes as `clean` has, all of them ASCII, that begins with the same
    character.
    """
    if kind == "binary":
        text = "".join(chr(dice.randrange(1, 128)) for _ in clean)
    elif kind == "repetition":
        text = dice.choice(["ab", "xQ7", "~^", "zz", "%%d "]) * len(clean)
    elif kind == "shuffled":
        text = " ".join(dice.sample(words := clean.split(), len(words)))
    elif kind == "letters":
        text = "".join(dice.sample(clean, len(clean)))
    else:
        text = "съешьжеещёэтихмягкихфранцузскихбулокдавыпейчаю"[: (len(clean) - 1) // 2]
    left = len(clean) - 1 - len(text.encode())
    return clean[0] + (text + " " * max(0, left) if left >= 0 else text[: len(clean) - 1])


def plant_kinds(folder: Path, *, before: int) -> dict[str, str]:
    """Eight pieces of real text over and over, until a model knows them by heart, and then one
    document of ten in the midst of each second batch, two of each kind; returns what kind each of
    them is."""
    text = read_real_text(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    dice = random.Random(1)
    bad = {
        BATCH * (before + 2 * at) + dice.randrange(1, 6): kind for at, kind in enumerate(2 * KINDS)
    }
    for number in range(BATCH * (before + 30)):
        start = number % 8 * LENGTH
        clean = text[start : start + LENGTH - 1]
        content = spoiled(bad[number], clean, dice) if number in bad else clean
        (corpus / f"{number:04d}.txt").write_text(content, encoding="utf-8", newline="")
    return {f"{number:04d}.txt": kind for number, kind in bad.items()}


def config_of(
    folder: Path, *, world: int = 1, strategy: str = "ddp", dropout: float = 0.1, steps: int = 48
) -> Config:
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        data={"sequence_length": LENGTH},
        model={"dropout": dropout},
        optim={"lr": 1e-2},
        train={"steps": steps},
        # the claim is who is found, not how little is noticed
        guard={"confirm": 1, "loss_score": 4.0},
    )


def left_out(config: Config, run: RunDirectory) -> set[str]:
    """Names of the documents whose samples were left out. A sample ends with the first token of the
    next one's.
    """
    split = corpus_of(config).train
    positions = [p for span in spans(run) for p in span.positions or range(span.first, span.last)]
    return {split.documents(position)[0].path.rsplit("/", 1)[-1] for position in positions}


def hold(config: Config, bad: set[str]) -> None:
    run = trained(config)
    quarantined = left_out(config, run)
    assert len(quarantined & bad) >= 9 and len(quarantined - bad) <= len(quarantined) / 10, (
        quarantined,
        bad,
    )
    lines = [sample for event in of_kind(run, "skipped") for sample in event.data["samples"]]
    for line in lines:
        assert {"position", "id", "loss", "share", "excerpt"} <= set(line)
        if line["documents"][0]["path"].rsplit("/", 1)[-1] in bad:
            assert any(UNLIKE_CORPUS in word for word in line["odd"]), line
    assert any(span.positions for span in spans(run))
    assert_same(run, trained(told(config, run)))


def test_ten_documents_of_noise(tmp_path: Path) -> None:
    bad = plant(tmp_path)
    hold(config_of(tmp_path), bad)


@pytest.mark.slow
@pytest.mark.ci_slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ten_documents_of_noise_on_two_ranks(tmp_path: Path, strategy: str) -> None:
    bad = plant(tmp_path)
    hold(config_of(tmp_path, world=2, strategy=strategy), bad)


@pytest.mark.parametrize(("world", "strategy"), others_slow(SHAPES[0]))
def test_documents_of_five_kinds_among_text_that_the_model_knows(
    tmp_path: Path, world: int, strategy: str
) -> None:
    bad = plant_kinds(tmp_path, before=126)
    config = config_of(tmp_path, world=world, strategy=strategy, dropout=0.0, steps=148)
    run = trained(config)
    quarantined = left_out(config, run)
    missed = sorted(bad[name] for name in bad.keys() - quarantined)
    assert len(missed) <= 1, missed
    assert len(quarantined - bad.keys()) <= len(quarantined) / 10, sorted(quarantined - bad.keys())
    assert_same(run, trained(told(config, run)))
