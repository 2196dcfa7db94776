"""Runs small enough for a test: two layers, 33 bytes a sample, real text with a stretch of
corrupted documents.

A rank is a fork of the test process that does what `python -m trainer` does. What a rank would
import by itself is imported here, once: torch._dynamo alone (which every torch optimizer imports)
takes longer than a whole run.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import trainer.__main__
import trainer.train
from guardrail.core.config import build_config
from guardrail.core.events.decisions import SamplesTaken
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Ended
from guardrail.core.records.commands import Command
from guardrail.core.records.spans import Span
from guardrail.core.records.verdicts import Mode, Remedy
from guardrail.core.toml_file import dump_toml
from guardrail.decide.run_history import RunHistory
from guardrail.report.quarantine import quarantine_lines
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.journal import last_turn
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.verification import fingerprint, verify
from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from tests.support.ranks import start_ranks, wait_ranks
from trainer.config.config import Config
from trainer.data.corpus import Corpus
from trainer.data.prepare import prepare_corpus

BATCH, LENGTH = 8, 32
SHAPES = [(1, "ddp"), (2, "ddp"), (2, "fsdp")]
# The same for tests of which one shape is enough while one works: .ci/run runs the sharded one,
# which costs three times as much, after the tests.
FEW_SHAPES = [*SHAPES[:2], pytest.param(*SHAPES[2], marks=pytest.mark.ci_slow)]
ONE_SHAPE = [SHAPES[0], *(pytest.param(*shape, marks=pytest.mark.ci_slow) for shape in SHAPES[1:])]


def others_slow(fast: tuple[int, str]) -> list[Any]:
    """Return the shapes for a test that runs with `fast`; those of the others are slow."""
    others = [shape for shape in SHAPES if shape != fast]
    return [fast, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in others)]


# [guard]: where no replay tells that the data alone is to blame, three rejections in a row call for
# a rollback.
BLIND: dict[str, Any] = {"cause_test": False}
# What two runs must have in common, bit by bit.
BANDS = ("loss_baseline", "loss_threshold", "grad_norm_threshold", "embed_grad_norm_threshold")
COMMON = ("step", "first", "last", "loss", "grad_norm", "embed_grad_norm", "lr", "tokens")


def write_corpus(folder: Path, *, documents: int = 120, bad: Sequence[int] = ()) -> Path:
    """Documents of 1000 characters of the standard library; those numbered in `bad` are mis-decoded
    noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = inspect.getsource(textwrap) + inspect.getsource(random)
    noise = random.Random(0)
    for number in range(documents):
        start = (number * 1537) % (len(source) - 1100)
        text = source[start : start + 1000]
        if number in bad:
            text = noise.randbytes(500).decode("latin-1")
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def tiny(folder: Path, *, world: int = 1, strategy: str = "ddp", **sections: Any) -> Config:
    """The checked configuration of a run that keeps its files under `folder`: dropout, two
    micro-batches a step.

    Args:
        sections: what to change: a dict for each section, a list for `faults`.
    """
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "root": str(folder / "runs")},
        "launch": {"processes": world, "device": "cpu", "threads": 1, "collective_seconds": 60.0},
        "data": {
            "sources": [str(folder / "corpus")],
            "sequence_length": LENGTH,
            "order": "stream",
            "eval_fraction": 0.0,
            "cache": str(folder / "cache"),
        },
        "model": {"layers": 2, "width": 32, "heads": 2, "dropout": 0.1},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "train": {
            "steps": 60,
            "batch_size": BATCH,
            "micro_batch_size": BATCH // world // 2,
            "strategy": strategy,
        },
        # Of some 60 batches a test spoils several: more than the share of its data that a real run
        # may skip by itself.
        "guard": {
            "window": 32,
            "warmup": 12,
            "confirm": 4,
            "persist": 3,
            "divergence_steps": 10,
            "max_skipped_share": 1.0,
        },
        "snapshots": {"every": 5, "keep": 4},
        "checkpoint": {"every": 20, "keep": 2},
        "tensorboard": {"enabled": False},
    }
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    for name, section in sections.items():
        if isinstance(section, dict):
            tree.setdefault(name, {}).update(section)
        else:
            tree[name] = section
    config = build_config(tree, file="tiny.toml", base=folder)
    assert isinstance(config, Config)
    return config


def train_with_a_stop(run: RunDirectory, world: int, *, step: int) -> None:
    """Train a run to a command `stop` after `step`, and resume it to its end."""
    run.send(Command(id="stop", kind="stop", at_step=step))
    with prompt_disk():
        assert train(run, world) == "stopped"
    assert train(run, world) == "finished"


def corpus_of(config: Config) -> Corpus:
    return Corpus.open(
        prepare_corpus(config.data, progress=lambda text, share: None, stop=lambda: False)
    )


def new_run(config: Config) -> RunDirectory:
    return RunDirectory.create(config.run.root, config.run.name, dump_toml(config))


@contextlib.contextmanager
def prompt_disk() -> Iterator[None]:
    """Ranks that start now wait for their saves: how slow a disk is does not decide which
    checkpoints there are.
    """
    save = CheckpointStore.save

    def waited(self: CheckpointStore, *given: Any, **named: Any) -> None:
        save(self, *given, **named)
        assert self.wait(60.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", waited)
        yield


def rank_main(rank: int) -> None:
    raise SystemExit(trainer.__main__.main())


def start_run(run: RunDirectory, world: int) -> list[int]:
    """Start the ranks of a run, as torch elastic would; returns their pids."""
    return start_ranks(
        rank_main,
        world,
        folder=run.path / "results",
        init=False,
        env={"GUARDRAIL_RUN": str(run.path)},
    )


def train(run: RunDirectory, world: int, *, seconds: float = 120.0) -> str:
    """Train a run directory to its end, or resume it; returns how it ended."""
    codes = wait_ranks(start_run(run, world), seconds=seconds)
    results = [file.read_bytes() for file in sorted((run.path / "results").glob("result-*"))]
    assert codes == [0] * world, (codes, results)  # a rank that a signal ended has left none
    return outcome(run)


def trained(config: Config, **options: Any) -> RunDirectory:
    """A new run, trained until it has finished."""
    run = new_run(config)
    assert train(run, config.world, **options) == "finished"
    return run


def outcome(run: RunDirectory) -> str:
    """How the run has ended, by its journal; "" while it has not, or was killed."""
    last = last_turn(run.events())
    return last.phase if isinstance(last, Ended) else ""


# -- what a run has left


def of_kind(run: RunDirectory, kind: str) -> list[Event]:
    return [event for event in run.events() if event.kind == kind]


def spans(run: RunDirectory) -> list[Span]:
    """What was left out, in the order of the journal."""
    found = [event.span for event in run.events() if isinstance(event, SamplesTaken)]
    return [span for span in found if span is not None]


def table(run: RunDirectory, columns: Sequence[str] = COMMON) -> np.ndarray:
    """float64 [applied steps of the present timeline, columns]."""
    view = run.metrics()
    here = view.current() & (view.column("verdict") == 0)
    return np.stack([view.column(name)[here] for name in columns], axis=1)


def final(run: RunDirectory) -> str:
    """Fingerprint of the newest checkpoint, after proving that it holds and is of the last step.

    One that a test has damaged may still be there, and comes before all others where its age cannot
    be read.
    """
    invalid = {
        event.data["path"]
        for event in of_kind(run, "checkpoint")
        if event.data["state"] == "invalid"
    }
    newest = next(path for path in checkpoint_dirs(run.checkpoints) if path.name not in invalid)
    status = run.read_status()
    assert status is not None
    assert verify(newest).step == status.step
    return fingerprint(newest)


def assert_same(a: RunDirectory, b: RunDirectory) -> None:
    """The present of both runs is the same, bit by bit: every applied step, and the weights at the
    end.

    Where both runs had a guard, so is what it expected of each step.
    """
    ours, theirs = table(a, (*COMMON, *BANDS)), table(b, (*COMMON, *BANDS))
    steps = ours[:, 0].tolist()
    assert steps == list(range(1, len(steps) + 1)), "the present is not one step after the other"
    assert len(ours) == len(theirs)
    for index, name in enumerate((*COMMON, *BANDS)):
        mine, others = ours[:, index], theirs[:, index]
        if name in BANDS and (np.isnan(mine).all() or np.isnan(others).all()):
            continue
        differ = np.flatnonzero((mine != others) & ~(np.isnan(mine) & np.isnan(others)))
        assert not len(differ), (
            f"{name} differs first at step {steps[differ[0]]}, in {len(differ)} steps"
        )
    assert final(a) == final(b)


def remedies_of(run: RunDirectory) -> tuple[Remedy, ...]:
    """What the guard has done besides leaving data out, as far as it stands."""
    return tuple(remedy for _, remedy in RunHistory.from_events(run.events()).remedies)


def told(config: Config, run: RunDirectory) -> Config:
    """The configuration of a run that knows from its beginning what `run` found out, with the guard
    off.
    """
    lines, remedies = quarantine_lines(run), remedies_of(run)
    assert lines or remedies, "nothing was left out: the comparison would show nothing"
    file = run.path / "quarantine.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    replace = msgspec.structs.replace
    return replace(
        config,
        guard=replace(config.guard, mode=Mode.OFF, remedies=(*config.guard.remedies, *remedies)),
        data=replace(config.data, quarantine=str(file)),
    )


def said(event: Event) -> tuple[str, str]:
    """What a line says, wherever in the journal it stands: a save or a copy comes in when a disk is
    ready.
    """
    return event.kind, re.sub(r"\bline \d+\b", "line", event.message)


def assert_whole(run: RunDirectory) -> None:
    """The journal counts without a gap, and every row of the metrics can be read."""
    seqs = [event.seq for event in run.events()]
    assert seqs == list(range(1, len(seqs) + 1))
    if run.metrics_path.exists():
        assert run.metrics_path.stat().st_size // (8 * len(run.metrics().columns)) == len(
            run.metrics()
        )
