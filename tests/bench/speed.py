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
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from guardrail.core.format import format_plural
from tests.bench.speed_contenders import (
    BATCH,
    LENGTH,
    VOCABULARY,
    Contender,
    Ours,
    bare,
    configuration,
    hugging_face,
    ranks_and_own,
)
from tests.support.bench_options import make_parser
from tests.support.ports import free_port
from trainer.config.config import Config
from trainer.config.sizes import parameter_count
from trainer.parallel.data_parallel import make_accelerator

# not counted: lazy initialisation, DDP's buckets, the first allocation of a snapshot
WARM_UP_ROUNDS = 4
# of a contender whose memory is measured: snapshots every 3 steps, so the ring of 4 is full by then
ALONE_STEPS = 15
OURS, OFF, HF = "guardrail", "guardrail, guard off", "Hugging Face Trainer"
NO_RING = "guardrail, no ring"
BARE = {"bare loop, fused AdamW": {"fused": True}, "bare loop, foreach AdamW": {"foreach": True}}


def compare(
    config: Config, off: Config, folder: Path, *, rounds: int, names: list[str]
) -> dict[str, Any]:
    """Return the seconds of the steps of each contender, taken in turn."""
    make_accelerator(config)
    contenders: dict[str, Contender] = {
        name: bare(off, **how) for name, how in BARE.items() if name in names
    }
    trainers: dict[str, Ours] = {}
    if OURS in names:
        trainers[OURS] = Ours(config, recorded=True)
    if OFF in names:
        trainers[OFF] = Ours(off, recorded=False)
    contenders |= trainers
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
        "seconds": {name: times[WARM_UP_ROUNDS:] for name, times in seconds.items()},
        "worked": {name: times[WARM_UP_ROUNDS:] for name, times in worked.items()},
    }
    if OURS in trainers:
        result["share"] = trainers[OURS].trainer.guard.status().guard_share
        result["waited"] = trainers[OURS].waited[WARM_UP_ROUNDS:]
    for each in trainers.values():
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
        one: Ours | None = None
        if name in (OURS, NO_RING, OFF):
            one = Ours(config, recorded=name != OFF)
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
    ranks = []
    for rank in range(world):
        errors = None  # those of rank 0 are shown
        if rank > 0:
            errors = subprocess.DEVNULL
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        )
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit(f"the ranks of {options} ended with {codes}")
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]


def ratios(times: dict[str, list[float]], mine: str, rivals: list[str]) -> str:
    """Return the medians of the ratios within a round."""
    medians = []
    for rival in rivals:
        pairs = zip(times[mine], times[rival], strict=True)
        medians.append(statistics.median(own / other for own, other in pairs))
    return " ".join(f"{median:11.3f}" for median in medians)


def report(world: int, found: dict[str, Any], memory: dict[str, float]) -> None:
    seconds, worked = found["seconds"], found["worked"]
    rivals = [name for name in seconds if name not in (OURS, OFF)]
    rounds = len(next(iter(seconds.values())))
    print(f"\n{format_plural(world, 'rank')}, {rounds} rounds in turn")
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
    parser = make_parser(__doc__)
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
    names = [*BARE, OURS, OFF]
    if importlib.util.find_spec("transformers"):
        names.append(HF)
    else:
        print(
            "transformers is not installed (pip install 'guardrail[hf]'): without the Hugging Face Trainer"
        )
    if arguments.only:
        names = [name for name in names if name in arguments.only.split(";")]
    names_alone = list(names)  # of the contenders whose memory is measured
    if OURS in names:
        names_alone.append(NO_RING)
    if arguments.no_memory:
        names_alone = []
    compiled = []
    if arguments.compile:
        compiled = ["--compile"]
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
            memory: dict[str, float] = {}
            for contender in names_alone:
                ranks = start(world, folder, arguments.threads, "--alone", contender, *compiled)
                memory[contender] = max(each["mib"] for each in ranks)
            report(world, found, memory)


if __name__ == "__main__":
    main()
