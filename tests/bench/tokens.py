"""Tokens a second of our training step against a bare PyTorch loop of the same model with its best AdamW.

    python tests/bench/tokens.py [--pairs 30] [--threads 2]

All contenders take one step in turn, so that whatever else the machine does strikes them alike; the table has the
median of each and the median of the ratios within a round. Goal: 1.0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from guardrail.config import LaunchSection
from trainer.config import Config, ModelSection, OptimSection, TrainSection
from trainer.model import Decoder
from trainer.objectives import loss_sum
from trainer.optim import Schedule, Scheduler, build_optimizer
from trainer.parallel import accumulating, distribute, make_accelerator, seed_micro_batch
from trainer.sizes import parameter_count

BATCH, LENGTH, VOCABULARY, STEPS = 8, 128, 259, 10_000
Contender = Callable[[], object]  # takes one whole training step over BATCH x LENGTH tokens


def configuration(threads: int) -> Config:
    """About 10 M parameters."""
    return Config(
        launch=LaunchSection(device="cpu", threads=threads),
        model=ModelSection(layers=8, width=320, heads=5),
        optim=OptimSection(lr=3e-4, warmup_steps=10),
        train=TrainSection(batch_size=BATCH, steps=STEPS),
    )


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator) for _ in range(8)]


def decoder(config: Config) -> Decoder:
    return Decoder(config.model, vocabulary=VOCABULARY, sequence_length=LENGTH, seed=0)


def bare(config: Config, **adamw: bool) -> Contender:
    """What one writes by hand: mean loss, clip_grad_norm_, AdamW, LambdaLR."""
    model = decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.1, **adamw)
    schedule = Schedule.of(config.optim, steps=STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step + 1) / config.optim.lr)
    data = batches()
    done = 0

    def step() -> None:
        nonlocal done
        rows = data[done % len(data)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss.item()
        done += 1

    return step


def ours(config: Config) -> Contender:
    """Our model, objective, optimizer and Accelerate, as trainer/loop.py joins them, without the guard."""
    accelerator = make_accelerator(config)
    model = distribute(decoder(config), config, accelerator)
    optimizer = build_optimizer(model, config.optim)
    scheduler = Scheduler(optimizer, Schedule.of(config.optim, steps=STEPS))
    data = batches()
    parameters = list(model.parameters())
    nominal = BATCH * LENGTH
    done = 0

    def step() -> None:
        nonlocal done
        rows = data[done % len(data)]
        seed_micro_batch(0, done * BATCH, 0)
        with accumulating(model, last=True):
            total, count = loss_sum(model(rows[:, :-1]), rows[:, 1:])
            accelerator.backward(total * (config.world / nominal))
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = math.sqrt(sum(n.item() ** 2 for n in torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, nominal / int(count) * min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total.item()
        done += 1

    return step


def measure(contenders: dict[str, Contender], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, contenders in turn, the first of a round another one each time."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 3:
        contenders[name]()
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            begin = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()
    config = configuration(arguments.threads)
    contenders = {
        "ours": ours(config),
        "bare loop, fused AdamW": bare(config, fused=True),
        "bare loop, foreach AdamW": bare(config, foreach=True),
    }
    seconds = measure(contenders, rounds=arguments.pairs)
    best = min((name for name in contenders if name != "ours"), key=lambda name: statistics.median(seconds[name]))
    print(
        f"{parameter_count(config.model, VOCABULARY) / 1e6:.1f} M parameters, batch {BATCH} x {LENGTH}, fp32, "
        f"{torch.get_num_threads()} threads, median of {arguments.pairs} rounds"
    )
    print(f"{'':26} {'ms a step':>10} {'tokens/s':>10} {'of the best bare loop':>22}")
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(seconds[best], times, strict=True))
        middle = statistics.median(times)
        print(f"{name:26} {middle * 1e3:10.1f} {BATCH * LENGTH / middle:10.0f} {ratio:22.3f}")


if __name__ == "__main__":
    main()
