"""The cells of the rescue benchmark: one fault, one method, one seed. See tests/bench/rescue.py."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from guardrail.core.config import build_config
from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.core.records.status import Phase
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.core.toml_file import dump_toml
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.guard.guard import Step
from tests.bench.rescue_faults import BATCH, FAULTS, STEPS, Staged
from tests.bench.rules import OlmoSkipStep
from tests.support.ranks import bury_ranks, ended, start_ranks
from trainer.config.config import Config
from trainer.train import Trainer

ARC = "arc-training==5.2.0.post1"
# Whether an update is to be left out. Called when its gradients are there, before they are clipped.
Rule = Callable[[Observation], bool]
SHOWN = ("verdict", "diagnosis", "skipped", "rollback", "remedy", "incident", "ended")


# -- arms ------------------------------------------------------------------------------------------


def olmo(trainer: Trainer) -> Rule:
    """OLMo-core's skip-step, by its formula; see tests/bench/rules.py."""
    rule = OlmoSkipStep()
    return lambda seen: rule.observe(seen.signals[LOSS], seen.signals[GRAD_NORM]) is not None


class _Rates:
    """What ARC needs of a scheduler: base rates that it may lower permanently."""

    def __init__(self, trainer: Trainer) -> None:
        self.base_lrs = [1.0]
        scheduler = trainer.guard.scheduler
        planned = scheduler.schedule
        scheduler.schedule = lambda step: planned(step) * self.base_lrs[0]


def arc(trainer: Trainer) -> Rule:
    """arc-training as its README shows it: `controller.step(loss)` before each update, with its
    defaults.
    """
    import arc as package

    config = package.ControllerConfig(verbose=False, log_interventions=False)
    controller = package.Controller(
        trainer.model, trainer.optimizers[0], config=config, scheduler=_Rates(trainer)
    )

    def rule(seen: Observation) -> bool:
        return bool(controller.step(torch.tensor(seen.signals[LOSS])).should_skip)

    return rule


# arm -> (sections of the configuration, the rule that is hung into the loop)
ARMS: dict[str, tuple[dict[str, Any], Callable[[Trainer], Rule] | None]] = {
    "unguarded": ({"guard": {"mode": "off"}}, None),
    "guardrail": ({"guard": {"mode": "auto"}}, None),
    "skip-step": ({"guard": {"mode": "off"}}, olmo),
    "ZClip": ({"guard": {"mode": "off"}, "optim": {"zclip": 2.5}}, None),
    "ARC": ({"guard": {"mode": "off"}}, arc),
}


def obey(trainer: Trainer, rule: Rule) -> None:
    observe = trainer.guard.controller.observe

    def ruled(seen: Observation) -> Verdict:
        verdict = observe(seen)
        if rule(seen):
            return msgspec.structs.replace(verdict, action=Action.SKIP, accepted=False)
        return verdict

    trainer.guard.controller.observe = ruled  # type: ignore[method-assign]


def cap(trainer: Trainer, *, attempts: int) -> None:
    """End a run without progress: a rule with NaN in its window or its weights skips every step."""
    train_step, tried = trainer.train_step, itertools.count(1)

    def capped(step: Step) -> None:
        train_step(step)
        if next(tried) >= attempts and trainer.guard.phase is None:
            trainer.guard.end(Phase.STOPPED, f"{attempts} attempts were made")

    trainer.train_step = capped  # type: ignore[method-assign]


# -- one cell --------------------------------------------------------------------------------------


def configuration(
    staged: Staged,
    arm: str,
    seed: int,
    *,
    folder: Path,
    cache: Path,
    steps: int,
    sections: dict[str, Any],
) -> Config:
    """Args: sections: of the configuration, changed for all cells."""
    world = staged.world
    tree: dict[str, Any] = {
        "run": {"name": "rescue", "root": str(folder / "runs")},
        "launch": {"processes": world, "device": "cpu", "threads": 1},
        "data": {
            "sources": ["builtin:python"],
            "sequence_length": 64,
            "seed": seed,
            "cache": str(cache / "data"),
        },
        "model": {"layers": 2, "width": 32, "heads": 2, "dropout": 0.0},
        "optim": {"lr": 3e-3, "warmup_steps": 30},
        "train": {
            "steps": steps,
            "batch_size": BATCH,
            "micro_batch_size": BATCH // world,
            "eval_every": 0,
            "eval_batches": 32 // world,
            "seed": seed,
        },
        "checkpoint": {"every": 100},
        # The runs are short: one fault may call for more than 3 % of their data. What is measured
        # here is the remedy. The limit would also halt the runs of the other rules.
        "guard": {"max_skipped_share": 1.0},
        "faults": list(staged.faults(steps)),
    }
    for name, section in itertools.chain(
        sections.items(), staged.sections.items(), ARMS[arm][0].items()
    ):
        tree.setdefault(name, {}).update(section)
    config = build_config(tree, file="rescue", base=folder)
    assert isinstance(config, Config)
    return config


def train_cell(
    rank: int, run: RunDirectory, config: Config, arm: str, packages: str
) -> dict[str, Any]:
    """Train one rank of a cell; the numbers of rank 0 are those of the cell."""
    sys.path.append(packages)
    trainer = Trainer(config, run=run)
    rule = ARMS[arm][1]
    if rule is not None:
        obey(trainer, rule(trainer))
    cap(trainer, attempts=2 * config.train.steps)
    losses: list[float] = []
    trainer.guard.log_eval = losses.append  # type: ignore[method-assign]
    began = time.perf_counter()
    phase = trainer.train()
    seconds = time.perf_counter() - began
    trainer.guard.context.progress.phase = None  # a run that was halted is evaluated as it stands
    trainer.evaluation.run(trainer.guard)
    return {
        "loss": losses[-1],
        "phase": phase.value,
        "step": trainer.guard.step,
        "seconds": seconds,
        "left_out": len(trainer.guard.cursor.quarantine),
    }


def numbers_of(run: RunDirectory, result: dict[str, Any]) -> dict[str, Any]:
    """Return a cell for the cache: the numbers of the rank and of the run directory."""
    events = run.events()
    attempts = len(run.metrics())
    causes = [event.data["cause"] for event in events if event.kind == "diagnosis"]
    return result | {
        "attempts": attempts,
        "lost": attempts - result["step"],
        "acts": sum(event.kind in ("skipped", "rollback") for event in events),
        "causes": causes,
        "journal": [
            f"{event.step} {event.kind}: {event.message}" for event in events if event.kind in SHOWN
        ],
    }


# -- all cells -------------------------------------------------------------------------------------

Cell = tuple[str, str, int]  # fault, arm, seed


class Bench:
    """Args:
    cache: folder of finished cells, of the corpus and of arc-training.
    steps: of each run.
    sections: of the configuration, changed for all cells.
    """

    def __init__(
        self, cache: Path, *, steps: int = STEPS, sections: dict[str, Any] | None = None
    ) -> None:
        self.cache, self.steps, self.sections = cache.resolve(), steps, sections or {}
        self.cache.mkdir(parents=True, exist_ok=True)

    def file(self, cell: Cell) -> Path:
        name = f"{'-'.join(map(str, cell))}-{self.steps}.json"
        return self.cache / name.replace(" ", "_").replace(",", "")

    def known(self, cell: Cell) -> dict[str, Any] | None:
        file = self.file(cell)
        if not file.exists():
            return None
        cell_numbers: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return cell_numbers

    def run(self, cells: Sequence[Cell], *, workers: int) -> None:
        """Run the missing cells, each in separate processes."""
        waiting = [cell for cell in cells if self.known(cell) is None]
        running: list[_Running] = []
        total, done = len(waiting), 0
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_Running(self, waiting.pop(0)))
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    done += 1
                    print(
                        f"{done}/{total} {self.keep(one.cell, one.outcome())}",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(0.02)
        finally:
            bury_ranks()
            for one in running:
                shutil.rmtree(one.folder, ignore_errors=True)

    def keep(self, cell: Cell, outcome: dict[str, Any]) -> str:
        """Write a finished cell; return a line about it."""
        partial = self.file(cell).with_suffix(".partial")
        partial.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
        partial.replace(self.file(cell))
        name = ", ".join(map(str, cell))
        if "error" in outcome:
            return f"{name}: {outcome['error'].strip().splitlines()[-1]}"
        return f"{name}: loss {outcome['loss']:.4f}"


class _Running:
    """A cell that is trained."""

    def __init__(self, bench: Bench, cell: Cell) -> None:
        fault, arm, seed = self.cell = cell
        staged = FAULTS[fault]
        self.folder = Path(tempfile.mkdtemp(prefix="rescue-"))
        config = configuration(
            staged,
            arm,
            seed,
            folder=self.folder,
            cache=bench.cache,
            steps=bench.steps,
            sections=bench.sections,
        )
        self.run = RunDirectory.create(config.run.root, config.run.name, dump_toml(config))
        packages = str(bench.cache / "packages")
        self.pids = start_ranks(
            train_cell,
            staged.world,
            self.run,
            config,
            arm,
            packages,
            init=False,
            folder=self.folder / "ranks",
        )

    def ended(self) -> bool:
        self.pids = [pid for pid in self.pids if ended(pid) is None]
        return not self.pids

    def outcome(self) -> dict[str, Any]:
        file = self.folder / "ranks" / "result-0"
        try:
            if not file.exists():
                return {"error": "the process ended without a word"}
            good, value = pickle.loads(file.read_bytes())
            if not good:
                return {"error": value}
            return numbers_of(self.run, value)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def install_arc(cache: Path) -> None:
    """Install arc-training into the cache, without its dependencies: its controller needs only torch."""
    target = cache.resolve() / "packages"
    if not (target / "arc").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(target),
            ARC,
        ]
        subprocess.run(command, check=False)
