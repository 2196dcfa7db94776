"""The training loops that tests/bench/speed.py compares, each on the same model and data."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from guardrail.core.config import build_config
from guardrail.core.toml_file import dump_toml
from guardrail.rundir.run_directory import RunDirectory
from trainer.config.config import Config
from trainer.model import Decoder
from trainer.train import Trainer

BATCH, LENGTH, VOCABULARY, STEPS = 8, 128, 259, 10_000
RATE, WARMUP = 3e-4, 10
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
            box = [""]
            if run is not None:
                box = [str(run.path)]
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
    across_ranks: dict[str, Any] = {}
    if world > 1:
        across_ranks = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
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
        **across_ranks,
    )
    transformers.Trainer(
        model=WithLoss(model), args=arguments, train_dataset=items, callbacks=[Conductor()]
    ).train()
