"""Corrupted documents are found in their batches and nothing else is left out; exactly, on any number of ranks."""

import random
from pathlib import Path

import pytest

from guardrail.rundir import RunDirectory
from tests.running import assert_same, corpus_of, of_kind, spans, tiny, told, trained, write_corpus
from trainer.config import Config

LENGTH = 64  # of a sample and, with its end, of a document: each document is one sample
DOCUMENTS, PLANTED = 420, 10


def plant(folder: Path) -> set[str]:
    """Real text in eight pieces, over and over, and ten documents of mis-decoded noise; returns the names of these."""
    write_corpus(folder / "whole", documents=8)
    text = "".join(file.read_text(encoding="utf-8") for file in sorted((folder / "whole").iterdir()))
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


def config_of(folder: Path, *, world: int = 1, strategy: str = "ddp") -> Config:
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        data={"sequence_length": LENGTH},
        model={"dropout": 0.1},
        optim={"lr": 1e-2},
        train={"steps": 48},
        guard={"confirm": 1},
    )


def left_out(config: Config, run: RunDirectory) -> set[str]:
    """Names of the documents whose samples were left out. A sample ends with the first token of the next one's."""
    split = corpus_of(config).train
    positions = [p for span in spans(run) for p in span.positions or range(span.first, span.last)]
    return {split.documents(position)[0].path.rsplit("/", 1)[-1] for position in positions}


def hold(config: Config, bad: set[str]) -> None:
    run = trained(config)
    quarantined = left_out(config, run)
    assert len(quarantined & bad) >= 9 and len(quarantined - bad) <= len(quarantined) / 10, (quarantined, bad)
    lines = [sample for event in of_kind(run, "left_out") for sample in event.data["samples"]]
    for line in lines:
        assert {"position", "id", "loss", "share", "excerpt"} <= set(line)
        if line["documents"][0]["path"].rsplit("/", 1)[-1] in bad:
            assert any("unlike the corpus" in word for word in line["odd"]), line
    assert any(span.positions for span in spans(run))
    assert_same(run, trained(told(config, run)))


def test_ten_documents_of_noise(tmp_path: Path) -> None:
    bad = plant(tmp_path)
    hold(config_of(tmp_path), bad)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ten_documents_of_noise_on_two_ranks(tmp_path: Path, strategy: str) -> None:
    bad = plant(tmp_path)
    hold(config_of(tmp_path, world=2, strategy=strategy), bad)
