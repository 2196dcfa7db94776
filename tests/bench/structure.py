"""Loss increase from shuffled labels, for text that a model knows, for other text and for bad data.

    python -m tests.bench.structure [--rounds 120 400]

It computes the measure of guardrail.decide.root_cause.add_label_order on a decoder of 35,000
parameters, after `--rounds` steps on the source of Python's standard library, with eight batches of
each kind, fp32 on the CPU.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from guardrail.core.config import build_config
from guardrail.core.records.status import Phase
from guardrail.torch.guard.guard import Step
from tests.support.bench_options import make_parser
from trainer.config.config import Config
from trainer.objectives.loss import shuffle_labels
from trainer.train import Trainer

ROWS, BATCHES, LENGTH = 16, 8, 64
A, LETTERS = ord("a"), 26

# Tokens [B, T + 1], dice -> (inputs [B, T], labels [B, T])
Kind = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def cut(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def lower(rows: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The rows with each lower-case letter changed, letters counted from 0."""
    return np.where((rows >= A) & (rows < A + LETTERS), change(rows - A), rows)


KINDS: dict[str, Kind] = {
    "as trained on": lambda rows, dice: cut(rows),
    "capitals": lambda rows, dice: cut(lower(rows, lambda letter: letter + ord("A"))),
    "rot13": lambda rows, dice: cut(lower(rows, lambda letter: (letter + 13) % LETTERS + A)),
    "backwards": lambda rows, dice: cut(rows[:, ::-1]),
    "labels three places off": lambda rows, dice: (cut(rows)[0], np.roll(cut(rows)[1], 3, axis=1)),
    "one n-gram a row": lambda rows, dice: cut(
        np.stack([np.resize(row[:4], len(row)) for row in rows])
    ),
    "labels shuffled": lambda rows, dice: (cut(rows)[0], dice.permuted(cut(rows)[1], axis=1)),
    "letters shuffled": lambda rows, dice: cut(dice.permuted(rows, axis=1)),
    "noise": lambda rows, dice: cut(dice.integers(0, 256, rows.shape)),
}


def trained(steps: int, folder: Path) -> Trainer:
    """Return a trainer after the first half of a run of twice as many steps."""
    tree = {
        "run": {"root": str(folder)},
        "launch": {"device": "cpu", "threads": 1},
        "data": {
            "sources": ["builtin:python"],
            "sequence_length": LENGTH,
            "cache": str(folder / "cache"),
        },
        "model": {"layers": 2, "width": 32, "heads": 2, "dropout": 0.0},
        "optim": {"lr": 3e-3, "warmup_steps": 30},
        "train": {
            "steps": 2 * steps,
            "batch_size": ROWS,
            "micro_batch_size": ROWS,
            "eval_every": 0,
        },
        "guard": {"mode": "off"},
    }
    config = build_config(tree, file="structure", base=folder)
    assert isinstance(config, Config)
    trainer = Trainer(config)
    step_of = trainer.train_step

    def counted(step: Step) -> None:
        step_of(step)
        if step.number == steps:
            trainer.guard.end(Phase.STOPPED, "trained enough")

    trainer.train_step = counted  # type: ignore[method-assign]
    trainer.train()
    return trainer


@torch.no_grad()
def loss(trainer: Trainer, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the loss in nats per token."""
    total, count = trainer.passes.loss_sum(
        trainer.model(torch.from_numpy(inputs)), torch.from_numpy(labels)
    )
    return float(total / count)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[120, 400], help="steps of training"
    )
    steps = parser.parse_args().rounds
    print("| steps | kind | loss | worth of the order | of the usual |\n|---|---|---|---|---|")
    for count in steps:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trained(count, Path(folder))
            usual = None
            for name, kind in KINDS.items():
                dice = np.random.default_rng(0)
                ids = np.random.default_rng(1).permutation(len(trainer.corpus.train))[
                    : ROWS * BATCHES
                ]
                plain, gains = [], []
                for batch in ids.reshape(BATCHES, ROWS).tolist():
                    inputs, labels = kind(trainer.corpus.train.tokens(batch), dice)
                    plain.append(loss(trainer, inputs, labels))
                    gains.append(
                        loss(trainer, inputs, shuffle_labels(labels, seeds=batch)) - plain[-1]
                    )
                worth = statistics.fmean(gains)
                usual = worth if usual is None else usual
                row = f"{statistics.fmean(plain):.2f} | {worth:+.2f} | {worth / usual:+.2f}"
                print(f"| {count} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
