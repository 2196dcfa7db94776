"""A step of guardrail's trainer, a bare PyTorch loop and the Hugging Face Trainer: time, memory, wait.

    python -m tests.bench.speed [--rounds 40] [--ranks 1,2] [--only NAME,NAME] [--compile]

All contenders train the same model from the same weights on batches of the same shape, with AdamW
and clipping at 1.0, each with its fastest AdamW. They take one step in turn in the same processes,
so that other load on the machine affects them alike. The table has medians, and medians of the
ratios within a round. CPU time of all threads of a rank varies less on a machine that others use.
The Hugging Face Trainer runs its own loop, so the others take their steps in its callback. It is
skipped if transformers is not installed.

"guardrail" is everything: measurement, detectors, snapshots every 10 steps, checkpoints every 200,
metrics and heartbeat. "guard off" is the same loop without detection, snapshots and run directory.
Peak memory is that of a process in which one contender trains alone, with its 4 snapshots. "no
ring" is guardrail with snapshots.keep = 0; only its memory is measured. Goal: as fast as the fastest
other one within noise, guardrail below 1 % of the step, and no more memory except for the
snapshots.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from guardrail.core.config import build_config
from guardrail.core.toml_file import dump_toml
from guardrail.rundir.run_directory import RunDirectory
from tests.support.ports import free_port
from trainer.config.config import Config
from trainer.config.sizes import parameter_count
from trainer.model import Decoder
from trainer.parallel.data_parallel import make_accelerator
from trainer.train import Trainer

BATCH, LENGTH, VOCABULARY, STEPS = 8, 128, 259, 10_000
RATE, WARMUP = 3e-4, 10
# not counted: lazy initialisation, DDP's buckets, the first allocation of a snapshot
WARM_UP_ROUNDS = 4
# of a contender whose memory is measured: snapshots every 3 steps, so the ring of 4 is full by then
ALONE_STEPS = 15
OURS, OFF, HF = "guardrail", "guardrail, guard off", "Hugging Face Trainer"
NO_RING = "guardrail, no ring"
BARE = {"bare loop, fused AdamW": {"fused": True}, "bare loop, foreach AdamW": {"foreach": True}}
Contender = Callable[[], object]  # takes one whole training step over BATCH x LENGTH tokens


def configuration(
    folder: Path,
    *,
    mode: str,
    ranks: int,
    threads: int,
    compiled: bool,
    every: int = 10,
    keep: int = 4,
) -> Config:
    """About 10 M parameters on the built-in text; `every` and `keep`: of the ring of snapshots."""
    tree: dict[str, Any] = {
        "run": {"root": str(folder / "runs")},
        "launch": {"device": "cpu", "processes": ranks, "threads": threads},
        "data": {"sequence_length": LENGTH, "cache": str(folder / "cache")},
        "model": {"layers": 8, "width": 320, "heads": 5},
        "optim": {"lr": RATE, "warmup_steps": WARMUP},
        "train": {"batch_size": BATCH, "steps": STEPS},
        "guard": {"mode": mode},
        "snapshots": {"every": every, "keep": keep},
        "checkpoint": {"every": 200},
    }
    if compiled:
        tree["train"]["compile"] = True
    config = build_config(tree, file="bench", base=folder)
    assert isinstance(config, Config)
    return config


def ranks_and_own() -> tuple[int, int]:
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def rows(rank: int, share: int) -> list[Tensor]:
    """Return some batches of one rank, in memory: [share, LENGTH + 1] each."""
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randint(0, VOCABULARY, (share, LENGTH + 1), generator=generator) for _ in range(8)
    ]


def decoder(config: Config) -> Decoder:
    return Decoder(config.model, vocabulary=VOCABULARY, sequence_length=LENGTH, seed=0)


# -- contenders


def bare(config: Config, **adamw: bool) -> Contender:
    """A loop written by hand: mean loss, clip_grad_norm_, AdamW, LambdaLR; DDP as in torch's guide."""
    world, rank = ranks_and_own()
    model: nn.Module = decoder(config)
    if config.train.compile:
        model.compile()
    if world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, **adamw)
    schedule = config.schedule(steps=STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step + 1) / RATE)
    data = rows(rank, BATCH // world)
    done = 0

    def step() -> None:
        nonlocal done
        batch = data[done % len(data)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss.item()
        done += 1

    return step


class Ours:
    """guardrail's trainer, one step per call.

    Attributes:
        waited: seconds that each step waited for its data.
    """

    def __init__(self, config: Config, *, recorded: bool) -> None:
        run = None
        if recorded:
            world, rank = ranks_and_own()
            if rank == 0:
                run = RunDirectory.create(config.run.root, "bench", dump_toml(config))
            box = [str(run.path) if run is not None else ""]
            if world > 1:
                dist.broadcast_object_list(box, src=0)
            run = run or RunDirectory(Path(box[0]))
        self.trainer = Trainer(config, run=run)
        self._steps = iter(self.trainer.guard)
        self.waited: list[float] = []
        self._load, self.trainer.loader.load = self.trainer.loader.load, self._timed_load  # type: ignore[method-assign]

    def _timed_load(self, batch: Any) -> Any:
        began = time.perf_counter()
        micro_batches = self._load(batch)
        self.waited.append(time.perf_counter() - began)
        return micro_batches

    def __call__(self) -> None:
        self.trainer.train_step(next(self._steps))

    def close(self) -> None:
        self.trainer.guard.close()
        self.trainer.loader.close()


class WithLoss(nn.Module):
    """What the Hugging Face Trainer trains: a module that is given labels and gives {"loss":
    ...}.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def hugging_face(config: Config, folder: Path, *, between: Callable[[float, float], bool]) -> None:
    """Train with transformers' Trainer until `between`, called with the seconds and CPU seconds of
    each step, has had enough."""
    import transformers

    world, _ = ranks_and_own()
    samples = [row for batch in rows(0, BATCH) for row in batch] * 200
    items = [{"input_ids": row[:-1], "labels": row[1:]} for row in samples]

    class Conductor(transformers.TrainerCallback):
        began = cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, _arguments: Any, _state: Any, control: Any, **_named: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            control.should_training_stop = not between(now - self.began, cpu - self.cpu)
            self.began, self.cpu = time.perf_counter(), time.process_time()

    model = decoder(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "hf"),
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        ddp_find_unused_parameters=False if world > 1 else None,
        per_device_train_batch_size=BATCH // world,
        max_steps=STEPS,
        learning_rate=RATE,
        weight_decay=0.1,
        adam_beta2=config.optim.beta2,
        warmup_steps=WARMUP,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=config.train.compile,
    )
    transformers.Trainer(
        model=WithLoss(model), args=arguments, train_dataset=items, callbacks=[Conductor()]
    ).train()


# -- measuring


def compare(
    config: Config, off: Config, folder: Path, *, rounds: int, names: list[str]
) -> dict[str, Any]:
    """Return the seconds of the steps of each contender, taken in turn."""
    make_accelerator(config)
    contenders: dict[str, Contender] = {
        name: bare(off, **how) for name, how in BARE.items() if name in names
    }
    ours = Ours(config, recorded=True) if OURS in names else None
    unguarded = Ours(off, recorded=False) if OFF in names else None
    contenders |= {
        name: each for name, each in ((OURS, ours), (OFF, unguarded)) if each is not None
    }
    order = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # CPU seconds of all threads of this rank
    worked: dict[str, list[float]] = {name: [] for name in names}
    turn = 0

    def one_round() -> None:
        for offset in range(len(order)):
            name = order[(turn + offset) % len(order)]
            if dist.is_initialized():
                dist.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            seconds[name].append(time.perf_counter() - began)
            worked[name].append(time.process_time() - cpu)

    def between(last: float, cpu: float) -> bool:
        nonlocal turn
        seconds[HF].append(last)
        worked[HF].append(cpu)
        one_round()
        turn += 1
        if dist.is_initialized():
            dist.barrier()
        return turn < rounds + WARM_UP_ROUNDS

    if HF in names:
        hugging_face(off, folder, between=between)
    else:
        while turn < rounds + WARM_UP_ROUNDS:
            one_round()
            turn += 1
    result: dict[str, Any] = {
        what: {name: times[WARM_UP_ROUNDS:] for name, times in found.items()}
        for what, found in (("seconds", seconds), ("worked", worked))
    }
    if ours is not None:
        result["share"] = ours.trainer.guard.status().guard_share
        result["waited"] = ours.waited[WARM_UP_ROUNDS:]
    for each in (ours, unguarded):
        if each is not None:
            each.close()
    return result


def alone(config: Config, folder: Path, *, name: str) -> dict[str, Any]:
    """Peak resident memory that training with one contender adds to a process that has imported
    everything, MiB.
    """
    make_accelerator(config)
    if HF == name:
        import transformers.trainer  # noqa: F401  its own code is not what is compared
    before = psutil.Process().memory_info().rss
    steps = 0
    if name == HF:

        def count(*_: float) -> bool:
            nonlocal steps
            steps += 1
            return steps < ALONE_STEPS

        hugging_face(config, folder, between=count)
    else:
        one = Ours(config, recorded=name != OFF) if name in (OURS, NO_RING, OFF) else None
        step = one or bare(config, **BARE[name])
        for _ in range(ALONE_STEPS):
            step()
        if one is not None:
            one.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"mib": (peak - before) / 2**20}


def child(arguments: argparse.Namespace) -> None:
    """Measure on one rank and write the result to its file."""
    world, rank = ranks_and_own()
    folder = Path(arguments.folder)
    if world > 1:
        dist.init_process_group("gloo")
    make = functools.partial(
        configuration, folder, ranks=world, threads=arguments.threads, compiled=arguments.compile
    )
    # A loop that nobody guards never goes back, and takes no copies.
    config, off = make(mode="auto"), make(mode="off", keep=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arguments.alone:
            of_name = {OURS: make(mode="auto", every=3), NO_RING: make(mode="auto", keep=0)}
            result = alone(of_name.get(arguments.alone, off), folder, name=arguments.alone)
        else:
            result = compare(
                config, off, folder, rounds=arguments.rounds, names=arguments.only.split(";")
            )
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    if world > 1:
        dist.destroy_process_group()


def start(world: int, folder: Path, threads: int, *options: str) -> list[dict[str, Any]]:
    """Run this file on `world` ranks; return the result of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if world > 1:  # else Accelerate would wrap the Hugging Face Trainer's model in DDP
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [
        sys.executable,
        "-m",
        "tests.bench.speed",
        "--folder",
        str(folder),
        "--threads",
        str(threads),
        *options,
    ]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(world)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit(f"the ranks of {options} ended with {codes}")
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]


def ratios(times: dict[str, list[float]], mine: str, rivals: list[str]) -> str:
    """Return the medians of the ratios within a round."""
    return " ".join(
        f"{statistics.median(a / b for a, b in zip(times[mine], times[rival], strict=True)):11.3f}"
        for rival in rivals
    )


def report(world: int, found: dict[str, Any], memory: dict[str, float]) -> None:
    seconds, worked = found["seconds"], found["worked"]
    rivals = [name for name in seconds if name not in (OURS, OFF)]
    print(
        f"\n{world} rank{'s' if world > 1 else ''}, {len(next(iter(seconds.values())))} rounds in turn"
    )
    heads = " ".join(f"{'/ ' + name.split(',')[-1].split()[0]:>11}" for name in rivals)
    print(f"{'':26} {'median ms':>9} {'CPU ms':>8} {'MiB':>6} | time {heads} | CPU time {heads}")
    for name in seconds:
        middle, cpu = statistics.median(seconds[name]) * 1e3, statistics.median(worked[name]) * 1e3
        row = f"{name:26} {middle:9.1f} {cpu:8.1f} {memory.get(name, float('nan')):6.0f}"
        print(
            f"{row} |      {ratios(seconds, name, rivals)} |          {ratios(worked, name, rivals)}"
        )
    if NO_RING in memory:
        print(f"{NO_RING:26} {'':9} {'':8} {memory[NO_RING]:6.0f} |")
    if OURS in seconds and OFF in seconds:
        both = [ratios(times, OURS, [OFF]).strip() for times in (seconds, worked)]
        means = statistics.fmean(worked[OURS]) / statistics.fmean(worked[OFF])
        print(
            f"guard on / off: time {both[0]}, CPU time {both[1]} (medians of the rounds), {means:.3f} (CPU, means)"
        )
    if OURS in seconds:
        print(f"what the guard says of itself: {found['share']:.2%} of the step")
        waited = found["waited"]
        middle, most, share = (
            statistics.median(waited),
            max(waited),
            sum(waited) / sum(seconds[OURS]),
        )
        print(
            f"waited for data: median {middle * 1e3:.3f} ms, most {most * 1e3:.3f} ms a step, {share:.3%} of the time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks to compare")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of each rank; more than idle cores measure only waiting",
    )
    parser.add_argument(
        "--only", default="", help="names of contenders, separated by semicolons; default: all"
    )
    parser.add_argument("--compile", action="store_true", help="all with torch.compile")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        child(arguments)
        return
    names = [*BARE, OURS, OFF] + ([HF] if importlib.util.find_spec("transformers") else [])
    if HF not in names:
        print(
            "transformers is not installed (pip install 'guardrail[hf]'): without the Hugging Face Trainer"
        )
    if arguments.only:
        names = [name for name in names if name in arguments.only.split(";")]
    compiled = ["--compile"] if arguments.compile else []
    for world in map(int, arguments.ranks.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = configuration(
                folder, mode="off", ranks=world, threads=arguments.threads, compiled=False
            )
            if world == 1:
                parameters = parameter_count(config.model, VOCABULARY) / 1e6
                print(f"{parameters:.1f} M parameters, global batch {BATCH} x {LENGTH}, fp32")
            options = ["--rounds", str(arguments.rounds), "--only", ";".join(names), *compiled]
            found = start(world, folder, arguments.threads, *options)[0]
            memory = {}
            classify_shift = [*names, NO_RING] if OURS in names else names
            for contender in [] if arguments.no_memory else classify_shift:
                ranks = start(world, folder, arguments.threads, "--alone", contender, *compiled)
                memory[contender] = max(each["mib"] for each in ranks)
            report(world, found, memory)


if __name__ == "__main__":
    main()
