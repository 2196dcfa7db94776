"""What the guard costs a step: the trainer with the guard on, off, and a bare PyTorch loop, in turn in one process.

    python tests/bench/guard.py [--rounds 60] [--threads 2]

"on" is the whole product: probes, detectors, snapshots every 10 steps, checkpoints every 200, metrics, heartbeat.
"off" is the same loop without detection, snapshots and run directory. Both medians and means are given, since copies
fall into single steps. Goal: below 1 % of the step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from guardrail.config import build, dump
from guardrail.rundir import RunDirectory
from tests.bench.tokens import BATCH, LENGTH, Contender, bare, measure
from trainer.config import Config
from trainer.loop import Trainer
from trainer.sizes import parameter_count


def configuration(folder: Path, *, mode: str, threads: int) -> Config:
    """About 10 M parameters, the same model as in tokens.py, on the built-in text."""
    tree = {
        "run": {"root": str(folder / "runs")},
        "launch": {"device": "cpu", "threads": threads},
        "data": {"sequence_length": LENGTH, "cache": str(folder / "cache")},
        "model": {"layers": 8, "width": 320, "heads": 5},
        "optim": {"lr": 3e-4, "warmup_steps": 10},
        "train": {"batch_size": BATCH, "steps": 10_000},
        "guard": {"mode": mode},
        # Without a guard nothing would ever go back: copies are part of what the guard costs.
        "snapshots": {"every": 10 if mode != "off" else 1_000_000},
        "checkpoint": {"every": 200},
    }
    config = build(tree, file="bench", base=folder)
    assert isinstance(config, Config)
    return config


def contender(config: Config, *, recorded: bool) -> tuple[Contender, Trainer]:
    run = RunDirectory.create(config.run.root, "bench", dump(config)) if recorded else None
    trainer = Trainer(config, run=run)
    steps = iter(trainer.guard)
    return lambda: trainer.train_step(next(steps)), trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        off_config = configuration(folder, mode="off", threads=arguments.threads)
        on, guarded = contender(configuration(folder, mode="auto", threads=arguments.threads), recorded=True)
        off, _ = contender(off_config, recorded=False)
        contenders = {"bare loop, fused AdamW": bare(off_config, fused=True), "guard off": off, "guard on": on}
        seconds = measure(contenders, rounds=arguments.rounds)
        share = guarded.guard.status().guard_share
        guarded.guard.close()
    parameters = parameter_count(off_config.model, 259) / 1e6
    print(f"{parameters:.1f} M parameters, batch {BATCH} x {LENGTH}, fp32, {arguments.rounds} rounds in turn")
    print(f"{'':24} {'median ms':>10} {'mean ms':>9} {'ratio to off, median of pairs':>30} {'ratio of means':>15}")
    for label, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, seconds["guard off"], strict=True))
        means = statistics.fmean(times) / statistics.fmean(seconds["guard off"])
        print(
            f"{label:24} {statistics.median(times) * 1e3:10.1f} {statistics.fmean(times) * 1e3:9.1f} "
            f"{ratio:30.4f} {means:15.4f}"
        )
    print(f"what the guard says of itself: {share:.2%} of the step")


if __name__ == "__main__":
    main()
