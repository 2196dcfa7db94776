"""A tiny training run on real text: two layers, 33 bytes a sample, a stretch of corrupted documents on demand."""

from __future__ import annotations

import inspect
import random
import textwrap
from pathlib import Path
from typing import Any

from guardrail.config import build
from guardrail.records import Phase
from guardrail.rundir import RunDirectory
from tests.ranks import run_ranks, start_ranks
from trainer.config import Config

BATCH, LENGTH = 8, 32


def write_corpus(folder: Path, *, documents: int = 120, bad: range = range(0), seed: int = 0) -> Path:
    """Documents of about 4 kB from the standard library's source; those numbered in `bad` are mis-decoded noise."""
    folder.mkdir(parents=True, exist_ok=True)
    source = inspect.getsource(textwrap) + inspect.getsource(random)
    noise = random.Random(seed)
    for number in range(documents):
        start = (number * 1537) % (len(source) - 1100)
        text = source[start : start + 1000]
        if number in bad:
            text = noise.randbytes(500).decode("latin-1")
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def tiny(folder: Path, *, world: int = 1, **sections: dict[str, Any]) -> Config:
    """The checked configuration of a tiny run that keeps its files under `folder`."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "root": str(folder / "runs")},
        "launch": {"processes": world, "device": "cpu", "threads": 1, "collective_seconds": 60.0},
        "data": {
            "sources": [str(folder / "corpus")],
            "sequence_length": LENGTH,
            "order": "stream",
            "eval_fraction": 0.05,
            "cache": str(folder / "cache"),
        },
        "model": {"layers": 2, "width": 32, "heads": 2, "dropout": 0.1},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "train": {"steps": 60, "batch_size": BATCH, "micro_batch_size": BATCH // world // 2},
        "guard": {"window": 32, "warmup": 12, "confirm": 4, "persist": 3, "divergence_steps": 10},
        "snapshots": {"every": 5, "keep": 4},
        "checkpoint": {"every": 20, "keep": 2},
        "tensorboard": {"enabled": False},
    }
    for name, section in sections.items():
        if isinstance(section, dict):
            tree.setdefault(name, {}).update(section)
        else:
            tree[name] = section
    config = build(tree, file="tiny.toml", base=folder)
    assert isinstance(config, Config)
    return config


def new_run(config: Config) -> RunDirectory:
    from guardrail.config import dump

    return RunDirectory.create(config.run.root, config.run.name, dump(config))


def rank_main(rank: int, path: Path) -> str:
    """What `python -m trainer` does, in a forked rank: returns the phase in which the run ended."""
    from guardrail.config import load
    from guardrail.heartbeat import Heartbeat
    from guardrail.signals import StopSignals
    from trainer.loop import train

    run = RunDirectory.open(path)
    signals = StopSignals()
    signals.install(run.logs / f"rank-{rank}.stacks")
    heartbeat = Heartbeat(run, rank).start()
    try:
        config = load(path / "config.toml")
        assert isinstance(config, Config)
        phase: Phase = train(config, run=run, signals=signals, heartbeat=heartbeat)
        return phase.value
    finally:
        heartbeat.stop()


def train_run(run: RunDirectory, world: int, *, seconds: float = 120.0) -> str:
    """Train a run directory on forked ranks to its end; returns how it ended."""
    phases = run_ranks(rank_main, world, run.path, folder=run.path / "results", init=False, seconds=seconds)
    assert len(set(phases)) == 1
    return str(phases[0])


def start_run(run: RunDirectory, world: int) -> list[int]:
    """Start forked ranks and return their pids."""
    return start_ranks(rank_main, world, run.path, folder=run.path / "results", init=False)
