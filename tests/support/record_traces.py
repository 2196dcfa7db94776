"""Stages real instabilities with the trainer and records what the controller saw of them.

    python -m tests.support.record_traces all | NAME... (without a name only truth.json is written)

Nothing is simulated: each is a training of a small decoder to which one thing is done at a known
step, so the truth is known by construction. The guard advises and changes nothing. Writes NAME.csv
and truth.json beside this file; a recording belongs to the versions of Python (whose library is the
text) and torch that made it, so the files are kept.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Verdict
from tests.support.places import TESTS
from tests.support.running import tiny
from trainer.data.loader import MicroBatch
from trainer.train import Trainer

HERE = TESTS / "cases" / "traces"
STEPS, ONSET = 320, 200
SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE)
MODULES = (
    "argparse",
    "ast",
    "calendar",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "inspect",
    "pathlib",
    "typing",
)

Batch = Callable[[int, MicroBatch, np.random.Generator], MicroBatch]
Before = Callable[[int, Trainer], None]


@dataclass(kw_only=True)
class Stage:
    """One instability.

    Attributes:
        what: for a person.
        expect: the least that must be advised: "healthy" (nothing), "note", "skip" or "rollback".
        most: the most that may be advised in the whole run.
        onset: first step that is touched.
        within: steps from the onset within which the verdict must fall.
        sections: of the configuration.
        batch: (step, micro-batch, dice) -> what the model gets instead.
        before: called before each step.
    """

    what: str
    expect: str
    most: str = "halt"
    onset: int = ONSET
    within: int = 5
    sections: dict[str, Any] = field(default_factory=dict)
    batch: Batch = lambda step, micro, dice: micro
    before: Before = lambda step, trainer: None


# -- data ------------------------------------------------------------------------------------------


def during(first: int, last: int, change: Batch) -> Batch:
    return lambda step, micro, dice: change(step, micro, dice) if first <= step < last else micro


def tokens_of(micro: MicroBatch, rows: np.ndarray) -> MicroBatch:
    """Rows of length + 1 as inputs and labels."""
    return changed(micro, tokens=rows[:, :-1].copy(), labels=rows[:, 1:].copy())


def noise(step: int, micro: MicroBatch, dice: np.random.Generator) -> MicroBatch:
    """Bytes without meaning, as of a document that was decoded wrongly."""
    rows, length = micro.tokens.shape
    return tokens_of(micro, dice.integers(128, 256, size=(rows, length + 1)))


def repeated(step: int, micro: MicroBatch, dice: np.random.Generator) -> MicroBatch:
    """Three rare bytes again and again."""
    rows, length = micro.tokens.shape
    return tokens_of(
        micro, np.tile(np.array([200, 3, 251]), (rows, length // 3 + 1))[:, : length + 1]
    )


def one_token(step: int, micro: MicroBatch, dice: np.random.Generator) -> MicroBatch:
    """The context is one token that the model has hardly met; what is to be predicted is
    unchanged.
    """
    return changed(micro, tokens=np.full_like(micro.tokens, 7))


def wrong_labels(step: int, micro: MicroBatch, dice: np.random.Generator) -> MicroBatch:
    return changed(
        micro, labels=dice.permuted(micro.labels.reshape(-1)).reshape(micro.labels.shape)
    )


def other_order(step: int, micro: MicroBatch, dice: np.random.Generator) -> MicroBatch:
    """A stretch of upper-case text in one piece, as a sorted file has it."""
    upper = lambda ids: np.where((ids >= 97) & (ids < 123), ids - 32, ids)  # noqa: E731
    return changed(micro, tokens=upper(micro.tokens), labels=upper(micro.labels))


# -- weights and schedule --------------------------------------------------------------------------


def at(step: int, change: Callable[[Trainer], None]) -> Before:
    return lambda now, trainer: change(trainer) if now == step else None


@torch.no_grad()
def blow_up_embedding(trainer: Trainer) -> None:
    """The rows of the commonest letters, tenfold, as one update with a broken second moment leaves
    them.
    """
    weight = trainer.model.get_parameter("embedding.weight")
    weight[97:123] *= 10.0


@torch.no_grad()
def remove_norm(trainer: Trainer) -> None:
    trainer.model.get_parameter("norm.weight").mul_(12.0)


def raise_rate(factor: float) -> Before:
    def before(step: int, trainer: Trainer) -> None:
        if step >= ONSET:
            for group in trainer.optimizer.param_groups:
                group["lr"] *= factor

    return before


@torch.no_grad()
def inflate(step: int, trainer: Trainer) -> None:
    """All matrices of the blocks grow by 4 % a step: sharper and sharper, and no single step is to
    blame.
    """
    if step >= ONSET:
        for name, parameter in trainer.model.named_parameters():
            if name.startswith("blocks") and parameter.ndim == 2:
                parameter.mul_(1.04)


def fault(kind: str, **fields: Any) -> dict[str, Any]:
    return {"faults": [{"kind": kind, "step": ONSET, **fields}]}


STAGES = {
    "healthy": Stage(what="nothing", expect="healthy", most="healthy"),
    "healthy_dropout": Stage(
        what="nothing, dropout 0.2",
        expect="healthy",
        most="healthy",
        sections={"model": {"dropout": 0.2}},
    ),
    "corrupted_documents": Stage(
        what="six batches of mis-decoded bytes",
        expect="rollback",
        batch=during(ONSET, ONSET + 6, noise),
    ),
    "repeated_ngrams": Stage(
        what="five batches of one n-gram",
        expect="rollback",
        batch=during(ONSET, ONSET + 5, repeated),
    ),
    "one_token": Stage(
        what="one token id through a whole batch",
        expect="skip",
        most="skip",
        batch=during(ONSET, ONSET + 1, one_token),
    ),
    "label_noise": Stage(
        what="labels shuffled in ten batches",
        expect="rollback",
        batch=during(ONSET, ONSET + 10, wrong_labels),
    ),
    "batch_order": Stage(
        what="forty batches of upper-case text in a row: harmless and soon learnt; no number tells it from bad data",
        expect="note",
        most="skip",
        batch=during(ONSET, ONSET + 40, other_order),
    ),
    "rate_too_high": Stage(
        what="learning rate x 100", expect="rollback", within=12, before=raise_rate(100.0)
    ),
    "no_warmup": Stage(
        what="learning rate 1 without warm-up",
        expect="rollback",
        onset=1,
        within=60,
        sections={"optim": {"lr": 1.0, "warmup_steps": 0}},
    ),
    "nan_gradient": Stage(
        what="one infinite gradient", expect="skip", within=1, sections=fault("inf_grad")
    ),
    "nan_loss": Stage(what="a loss of NaN", expect="skip", within=1, sections=fault("nan_loss")),
    "loss_fault": Stage(
        what="loss x 3 once",
        expect="skip",
        most="skip",
        within=1,
        sections=fault("spike_loss", value=3.0),
    ),
    "gradient_fault": Stage(
        what="gradients x 1000 once",
        expect="skip",
        most="skip",
        within=1,
        sections=fault("spike_grad", value=1000.0),
    ),
    "embedding_rows": Stage(
        what="embedding rows of the letters x 10",
        expect="rollback",
        before=at(ONSET, blow_up_embedding),
    ),
    "norm_removed": Stage(
        what="scale of the last norm x 12", expect="rollback", before=at(ONSET, remove_norm)
    ),
    "weights_grow": Stage(
        what="matrices grow by 4 % a step: the loss creeps up by a fifth in 80 steps",
        expect="note",
        within=60,
        before=inflate,
    ),
}


class Recording(Trainer):
    """A trainer to which a stage is done."""

    stage: Stage

    def begin(self, stage: Stage) -> Recording:
        self.rows: list[list[float]] = []
        self.now = 0
        dice = np.random.default_rng(0)
        load, observe = self.loader.load, self.guard.controller.observe

        def staged(batch: Any) -> list[MicroBatch]:
            return [stage.batch(self.now, micro, dice) for micro in load(batch)]

        def recorded(seen: Observation) -> Verdict:
            self.rows.append([seen.step, *(seen.signals[name] for name in SIGNALS)])
            return observe(seen)

        self.loader.load = staged  # type: ignore[method-assign]
        self.guard.controller.observe = recorded  # type: ignore[method-assign]
        self.stage = stage
        return self

    def train_step(self, step: Any) -> None:
        self.now = step.number
        self.stage.before(step.number, self)
        super().train_step(step)


def write_text(folder: Path) -> None:
    """Documents of 1000 characters from Python's library, modules mixed."""
    import importlib
    import inspect

    folder.mkdir(parents=True)
    texts = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    for number in range(400):
        text = texts[number % len(texts)]
        start = (number // len(texts)) * 1000 % max(1, len(text) - 1000)
        (folder / f"{number:04d}.txt").write_text(text[start : start + 1000], encoding="utf-8")


def record(stage: Stage, folder: Path) -> list[list[float]]:
    """Rows [step, loss, grad_norm, embed_grad_norm, embed_share] of a run with the stage done to
    it.
    """
    sections: dict[str, Any] = {
        "data": {"sequence_length": 64, "order": "shuffled"},
        "model": {"dropout": 0.0, "width": 48},
        "optim": {"lr": 3e-3, "warmup_steps": 30},
        "train": {"steps": STEPS, "batch_size": 16, "micro_batch_size": 16},
        "guard": {"mode": "advise"},
        "snapshots": {"every": 1000, "keep": 2},
    }
    for name, section in stage.sections.items():
        sections[name] = (
            {**sections.get(name, {}), **section} if isinstance(section, dict) else section
        )
    config = tiny(folder, **sections)
    trainer = Recording(config).begin(stage)
    trainer.train()
    return trainer.rows


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "corpus")
        for name in STAGES if names == ["all"] else names:
            rows = record(STAGES[name], Path(folder))
            with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["step", *SIGNALS])
                writer.writerows(
                    [int(step), *(f"{value:.6g}" for value in values)] for step, *values in rows
                )
            print(f"{name}: {len(rows)} steps, last loss {rows[-1][1]:.3f}", file=sys.stderr)
    truth = {
        name: {key: getattr(stage, key) for key in ("what", "expect", "most", "onset", "within")}
        for name, stage in STAGES.items()
    }
    (HERE / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
