"""Which method rescues a run: one fault per run of a small language model, the same for each method.

    python -m tests.bench.rescue [--seeds 0 1 2] [--faults NAME ...] [--arms NAME ...] [--quick]
    [--workers 2]

Decoders of 35,000 parameters on the source of Python's standard library, fp32 on the CPU. All arms
share data, seeds, clip and schedule. "healthy" is the same run without fault and guard. Each
finished cell is stored as a JSON file under --cache, so an interrupted benchmark continues. Delete
the folder after a change of the code. The table has the finished cells; --only-table prints it
without any run.

arc-training is installed by pip into the cache on the first run; nothing else depends on it. Without
a network its column gives the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import shutil
import statistics
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
from tests.bench.rescue_faults import BATCH, FAULTS, HEALTHY, HEALTHY_TWO, STEPS, Staged, healthy
from tests.bench.rules import OlmoSkipStep
from tests.support.ranks import bury_ranks, ended, start_ranks
from trainer.config.config import Config
from trainer.train import Trainer

ARC = "arc-training==5.2.0.post1"
# Whether an update is to be left out. Called when its gradients are there, before they are clipped.
Rule = Callable[[Observation], bool]
NONE = (HEALTHY, HEALTHY_TWO)
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
        return (
            msgspec.structs.replace(verdict, action=Action.SKIP, accepted=False)
            if rule(seen)
            else verdict
        )

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
        return self.cache / f"{'-'.join(map(str, cell))}-{self.steps}.json".replace(
            " ", "_"
        ).replace(",", "")

    def known(self, cell: Cell) -> dict[str, Any] | None:
        file = self.file(cell)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

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
        said = (
            outcome["error"].strip().splitlines()[-1]
            if "error" in outcome
            else f"loss {outcome['loss']:.4f}"
        )
        return f"{', '.join(map(str, cell))}: {said}"


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
        good, value = (
            pickle.loads(file.read_bytes())
            if file.exists()
            else (False, "the process ended without a word")
        )
        try:
            return numbers_of(self.run, value) if good else {"error": value}
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


# -- the table -------------------------------------------------------------------------------------


def excess(bench: Bench, cell: Cell) -> float | None:
    """Return held-out loss / that of the healthy run of the same seed - 1; inf if it is not finite."""
    own, sound = bench.known(cell), bench.known((healthy(cell[0]), "unguarded", cell[2]))
    if own is None or sound is None or "error" in own:
        return None
    return own["loss"] / sound["loss"] - 1 if own["loss"] == own["loss"] else float("inf")


def shown(values: Sequence[float | None]) -> str:
    """Return the median over the seeds and the worst seed, in percent."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return _percent(known[0])
    return f"{_percent(statistics.median(known))} ({_percent(max(known))})"


def _percent(value: float) -> str:
    if value > 10:
        return "NaN" if value == float("inf") else "> 1000"
    return f"{100 * value:+.1f}"


def print_table(
    bench: Bench, faults: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> None:
    print(
        f"Held-out loss above the healthy run's, in %: median (worst) of {len(seeds)} seeds, {bench.steps} steps\n"
    )
    columns = ["fault", *arms, "steps lost", "samples left out", "cause named"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for fault in faults:
        row = [shown([excess(bench, (fault, arm, seed)) for seed in seeds]) for arm in arms]
        print("| " + " | ".join([fault, *row, *_guarded(bench, fault, seeds)]) + " |")
    print()
    for line in summary(bench, faults, arms, seeds):
        print(line)


def _guarded(bench: Bench, fault: str, seeds: Sequence[int]) -> list[str]:
    """Return what guardrail's rescue cost, and whether it named the right cause."""
    cells = [bench.known((fault, "guardrail", seed)) for seed in seeds]
    known = [cell for cell in cells if cell is not None and "error" not in cell]
    if not known:
        return ["", "", ""]
    lost, out = (
        round(statistics.median(cell[key] for cell in known)) for key in ("lost", "left_out")
    )
    wanted = FAULTS[fault].causes
    told = [cell["causes"] for cell in known]
    if not any(told):
        return [str(lost), str(out), ""]
    names = ", ".join(dict.fromkeys(itertools.chain.from_iterable(told)))
    right = sum(named(causes, wanted) for causes in told)
    return [str(lost), str(out), f"{right}/{len(known)}: {names}"]


def named(causes: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the first diagnosis names a right cause."""
    return bool(causes) and causes[0] in wanted


def summary(
    bench: Bench, faults: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    lines = []
    for arm in arms:
        staged = [(fault, arm, seed) for fault in faults if fault not in NONE for seed in seeds]
        values = [value for value in (excess(bench, cell) for cell in staged) if value is not None]
        sound = [bench.known((fault, arm, seed)) for fault in NONE for seed in seeds]
        acts = sum(cell["acts"] for cell in sound if cell is not None and "error" not in cell)
        if values:
            near = sum(value <= 0.01 for value in values)
            lines.append(
                f"{arm}: within 1 % in {near} of {len(values)}; interventions on healthy runs: {acts}"
            )
    known = [(fault, bench.known((fault, "guardrail", seed))) for fault in faults for seed in seeds]
    judged = [(fault, cell["causes"]) for fault, cell in known if cell and cell.get("causes")]
    if judged:
        right = sum(named(causes, FAULTS[fault].causes) for fault, causes in judged)
        lines.append(f"the right cause first: {right} of {len(judged)} runs in which one was told")
    ratios = [
        one["seconds"] / other["seconds"]
        for one, other in (
            (bench.known((HEALTHY, arm, seed)) for arm in ("guardrail", "unguarded"))
            for seed in seeds
        )
        if one and other and "error" not in one and "error" not in other
    ]
    if ratios:
        lines.append(
            f"wall time of a healthy run, guardrail over unguarded: median {statistics.median(ratios):.2f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="one seed, guardrail and unguarded")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(".rescue"))
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument(
        "--journal", action="store_true", help="also what guardrail said in each run"
    )
    arguments = parser.parse_args()
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    arms = ["unguarded", "guardrail"] if arguments.quick else arguments.arms
    faults = list(dict.fromkeys([*NONE, *arguments.faults]))
    bench = Bench(arguments.cache)
    if "ARC" in arms and not arguments.only_table:
        install_arc(arguments.cache)
    sound = [
        (fault, arm, seed)
        for seed in seeds
        for fault in NONE
        for arm in dict.fromkeys(["unguarded", *arms])
    ]
    staged = [
        (fault, arm, seed)
        for seed in seeds
        for fault in faults
        if fault not in NONE
        for arm in arms
    ]
    bench.run([] if arguments.only_table else [*sound, *staged], workers=arguments.workers)
    print_table(bench, faults, arms, seeds)
    if arguments.journal:
        for fault, seed in itertools.product(faults, seeds):
            cell = bench.known((fault, "guardrail", seed)) or {}
            print(
                f"\n{fault}, seed {seed}:",
                *cell.get("journal", []),
                cell.get("error", ""),
                sep="\n  ",
            )


if __name__ == "__main__":
    main()
