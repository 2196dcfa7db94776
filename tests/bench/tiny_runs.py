"""False alarms: what guardrail finds in healthy runs of tiny models with a tiny configuration.

    python -m tests.bench.tiny_runs [--runs 100] [--steps 600] [--set guard.KEY=VALUE]

Each run trains in this process for about a second: a character model of 6,800 parameters (two
characters of context, embeddings of 8, a hidden layer of 16), with Adam and clipping, on the source
of Python's library. Runs differ in seed, batch (16 to 128 characters), learning rate, and in whether
batches are drawn at random or read in the order of the text. None has a fault. The baseline has a
history of 32 steps, from 12 on.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from guardrail.core.config import load_guard_options
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Action, Mode
from guardrail.decide.controller import Controller
from tests.support.bench_options import make_parser

SETTINGS = ("guard.window=32", "guard.warmup=12")
EMBEDDING, HIDDEN, CONTEXT, VOCABULARY = 8, 16, 2, 256
CLIP, BETAS, WARM_UP = 1.0, (0.9, 0.95), 20


def corpus(files: int = 40) -> np.ndarray:
    """Return the bytes of the first modules of Python's library."""
    folder = Path(os.__file__).parent
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))[:files]]
    return np.frombuffer(b"\n".join(texts), dtype=np.uint8).astype(np.int64)


class Model:
    """Weights, gradients and Adam by hand: a step takes half a millisecond."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        shapes = ((VOCABULARY, EMBEDDING), (CONTEXT * EMBEDDING, HIDDEN), (HIDDEN, VOCABULARY))
        self.weights = [draw.normal(0.0, shape[0] ** -0.5, shape) for shape in shapes]
        self._first = [np.zeros(shape) for shape in shapes]
        self._second = [np.zeros(shape) for shape in shapes]
        self._step = 0

    def gradients(self, context: np.ndarray, target: np.ndarray) -> tuple[float, list[np.ndarray]]:
        """Return (mean loss in nats, gradients). `context` is [tokens, 2], `target` [tokens]."""
        embedding, inner, outer = self.weights
        x = embedding[context].reshape(len(target), -1)
        h = np.tanh(x @ inner)
        logits = h @ outer
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(target))
        loss = float(-np.log(p[rows, target] + 1e-30).mean())
        p[rows, target] -= 1.0
        p /= len(target)
        dh = (p @ outer.T) * (1.0 - h * h)
        de = np.zeros_like(embedding)
        np.add.at(de, context.reshape(-1), (dh @ inner.T).reshape(-1, EMBEDDING))
        return loss, [de, x.T @ dh, h.T @ p]

    def update(self, gradients: list[np.ndarray], *, rate: float, norm: float) -> None:
        self._step += 1
        factor = min(1.0, CLIP / norm)
        for w, g, m, v in zip(self.weights, gradients, self._first, self._second, strict=True):
            g *= factor
            m += (1 - BETAS[0]) * (g - m)
            v += (1 - BETAS[1]) * (g * g - v)
            scale = math.sqrt(1 - BETAS[1] ** self._step) / (1 - BETAS[0] ** self._step)
            w -= rate * scale * m / (np.sqrt(v) + 1e-8)


def train(text: np.ndarray, seed: int, steps: int) -> Iterator[tuple[float, float]]:
    """Return (loss, gradient norm) of each step."""
    draw = random.Random(seed)
    tokens, rate, in_order = (
        draw.choice((16, 32, 64, 128)),
        draw.choice((1e-3, 3e-3, 1e-2)),
        draw.random() < 0.5,
    )
    model, begin = Model(seed), draw.randrange(len(text) // 2)
    for step in range(steps):
        at = np.arange(begin + step * tokens, begin + (step + 1) * tokens)
        if not in_order:
            at = np.array([draw.randrange(len(text) - CONTEXT) for _ in range(tokens)])
        at = at % (len(text) - CONTEXT)
        loss, gradients = model.gradients(
            np.stack([text[at], text[at + 1]], axis=1), text[at + CONTEXT]
        )
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        model.update(gradients, rate=rate * min(1.0, (step + 1) / WARM_UP), norm=norm)
        yield loss, norm


def judge(rows: list[tuple[float, float]], settings: GuardOptions) -> Counter[str]:
    """Return what the guard would have done: verdicts, and the number of incidents."""
    controller = Controller(settings, mode=Mode.ADVISE)
    found: Counter[str] = Counter()
    incidents = set()
    for step, (loss, norm) in enumerate(rows, 1):
        signals = {LOSS: loss, GRAD_NORM: norm}
        verdict = controller.observe(
            Observation(step=step, first=step, last=step + 1, signals=signals)
        )
        action = verdict.would or verdict.action
        if action is not Action.APPLY:
            found[action.value] += 1
            found[f"  {action.value} by {verdict.findings[0].kind.value}"] += 1
            incidents.add(verdict.incident)
        elif verdict.findings:
            found["note"] += 1
    found["incidents"] = len(incidents)
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    settings = load_guard_options(None, overrides=[*SETTINGS, *arguments.overrides])
    text = corpus()
    total: Counter[str] = Counter()
    for seed in range(arguments.first, arguments.first + arguments.runs):
        found = judge(list(train(text, seed, arguments.steps)), settings)
        total += found
        total["runs with an act"] += bool(found["incidents"])
    print(f"{arguments.runs} healthy runs of {arguments.steps} steps:")
    for name, count in sorted(total.items()):
        print(f"{name:32} {count:6}")


if __name__ == "__main__":
    main()
