"""The complete configuration of the built-in trainer: guardrail's sections and the trainer's own.

Imports no torch: `guardrail launch` refuses a bad file before any process starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError
from guardrail.core.files import why_unreachable
from guardrail.core.format import format_gib
from guardrail.core.packages import install_hint, is_installed
from trainer.config import preset
from trainer.config.batch_ramp import BatchPlan
from trainer.config.layout import Layout, ParallelSection
from trainer.config.recipe import ModelSection, OptimSection, check_objective, nearest_multiple
from trainer.config.schedule import Schedule, warmup_steps
from trainer.config.sections import (
    BYTE_IDS,
    TRAINED,
    DataSection,
    FaultSection,
    TrainSection,
    check_faults,
)
from trainer.config.sizes import state_bytes
from trainer.optim.registry import names_of
from trainer.sources.registry import builtin_names, source_of_entry


class Config(GuardConfig, frozen=True, kw_only=True):
    """The sections of a configuration file, and what follows from several of them."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    faults: tuple[FaultSection, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.launch.processes * self.launch.nodes

    @property
    def layout(self) -> Layout:
        """The mesh of ranks. Raises ConfigError if the numbers do not fit, as `check` does."""
        return Layout.from_section(self.parallel, world=self.world, strategy=self.train.strategy)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward and backward pass of one rank."""
        if self.train.micro_batch_size:
            return self.train.micro_batch_size
        smallest_batch = self.train.batch_ramp.start or self.train.batch_size
        return smallest_batch // self.layout.data_ranks

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one update."""
        return self.train.batch_size // (self.layout.data_ranks * self.micro_batch_size)

    @property
    def batch_plan(self) -> BatchPlan:
        """Samples of a batch as a function of the step."""
        train = self.train
        if not train.batch_ramp.start:
            return BatchPlan.constant(train.batch_size)
        by = train.batch_ramp.increment or self.layout.data_ranks * self.micro_batch_size
        samples = -(-train.batch_ramp.tokens // self.data.sequence_length)
        return BatchPlan.growing(
            start=train.batch_ramp.start, by=by, size=train.batch_size, samples=samples
        )

    def schedule(self, *, steps: int) -> Schedule:
        """Return the learning rate as a function of the step, for a run of `steps` updates."""
        length = self.data.sequence_length
        warmup = warmup_steps(self.optim, steps=steps, plan=self.batch_plan, sequence_length=length)
        return Schedule.from_section(self.optim, steps=steps, warmup=warmup)

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return preset.with_preset(tree)

    def resolved(self, *, base: Path) -> Config:
        config = super().resolved(base=base)
        assert isinstance(config, Config)
        data = config.data
        data = msgspec.structs.replace(
            data,
            sources=tuple(source_of_entry(s).resolve(s, base=base) for s in data.sources),
            tokenizer=_absolute(base, data.tokenizer, but=TRAINED),
            quarantine=_absolute(base, data.quarantine),
            cache=_absolute(base, data.cache),
        )
        model = msgspec.structs.replace(config.model, hf=_absolute(base, config.model.hf))
        return msgspec.structs.replace(config, data=data, model=model)

    def check(self, *, base: Path) -> None:
        super().check(base=base)
        self._check_batch()
        self._check_ramp()
        self._check_data(base)
        check_faults(self.faults, world=self.world)
        self.model.check(base=base)
        strategy = "ddp"
        if self.layout.sharded:
            strategy = "fsdp"
        self.optim.check(self.model, strategy=strategy)
        self.layout.check_model(self.model, self.optim, self.train)
        self._check_pipeline()
        self._check_sequence()
        check_objective(self.train.objective, self.model)
        self._check_gate()
        self._check_compile()
        if bool(self.train.steps) == bool(self.train.epochs):
            raise ConfigError(
                "either train.steps or train.epochs above 0, and the other one 0",
                key="train.steps",
                value=self.train.steps,
                hint=f"train.epochs is {self.train.epochs}",
            )
        self._check_warmup()
        if self.train.eval_every and not self.data.eval_fraction:
            raise ConfigError(
                "0, or held-out documents to evaluate on",
                key="train.eval_every",
                value=self.train.eval_every,
                hint="set data.eval_fraction above 0",
            )

    def _check_gate(self) -> None:
        """Refuse what `guard.decide = "deferred"` cannot work with.

        The device decides then, and the host reads the numbers of a step after its update.
        """
        optim = self.optim
        forbidden = {
            "optim.name": (
                optim.name,
                not optim.spec.works_deferred,
                " or ".join(f'"{name}"' for name in names_of(having="works_deferred")),
            ),
            "optim.implementation": (
                optim.implementation,
                optim.implementation != "fused",
                '"fused"',
            ),
            "optim.zclip": (optim.zclip, bool(optim.zclip), "0"),
            "optim.qk_clip": (optim.qk_clip, bool(optim.qk_clip), "0"),
            "optim.stable": (optim.stable, optim.stable, "false"),
            "train.precision": (
                self.train.precision,
                self.train.precision == "fp16",
                '"bf16" or "fp32"',
            ),
            "parallel.cpu_offload": (True, self.parallel.cpu_offload, "false"),
        }
        if self.guard.decide == "deferred":
            _refuse(forbidden, instead='guard.decide = "before_step"')

    def _check_compile(self) -> None:
        forbidden = {
            "parallel.pp": (self.layout.pp, self.layout.pp > 1, "1"),
            "parallel.tp": (self.layout.tp, self.layout.tp > 1, "1"),
            "optim.qk_clip": (self.optim.qk_clip, bool(self.optim.qk_clip), "0"),
            "train.activation_checkpointing": (True, self.train.activation_checkpointing, "false"),
        }
        if self.train.compile:
            _refuse(forbidden, instead="train.compile = false")

    def _check_warmup(self) -> None:
        """Refuse a warm-up that is longer than the run.

        With train.epochs the number of steps is known only when the data is.
        """
        steps, optim = self.train.steps, self.optim
        if not steps or self.schedule(steps=steps).warmup < steps:
            return
        key, expected = "warmup_steps", f"less than train.steps ({steps})"
        if optim.warmup_tokens:
            key, expected = "warmup_tokens", f"fewer tokens than {steps} steps have"
        raise ConfigError(
            expected,
            key=f"optim.{key}",
            value=getattr(optim, key),
            hint="the learning rate would never reach its peak",
        )

    def _check_ramp(self) -> None:
        train, ramp = self.train, self.train.batch_ramp
        if bool(ramp.start) != bool(ramp.tokens) or (ramp.increment and not ramp.start):
            key = "start"
            if ramp.start:
                key = "tokens"
            raise ConfigError(
                "start and tokens both above 0, or neither", key=f"train.batch_ramp.{key}", value=0
            )
        if not ramp.start:
            return
        share = self.layout.data_ranks * self.micro_batch_size
        by = train.batch_ramp.increment or share
        if (
            not share
            or train.batch_ramp.start % share
            or train.batch_ramp.start >= train.batch_size
        ):
            least = share or self.layout.data_ranks
            raise ConfigError(
                f"a multiple of {least} (data ranks x micro_batch_size) below train.batch_size",
                key="train.batch_ramp.start",
                value=train.batch_ramp.start,
            )
        if by % share or (train.batch_size - train.batch_ramp.start) % by:
            raise ConfigError(
                f"a multiple of {share} (data ranks x micro_batch_size) that divides "
                f"batch_size - batch_ramp.start = {train.batch_size - train.batch_ramp.start}",
                key="train.batch_ramp.increment",
                value=by,
            )

    def _check_pipeline(self) -> None:
        stages, count = self.layout.pp, self.micro_batches
        # Interleaved 1F1B runs micro-batches in rounds of equal size, at least one per stage each.
        rounds = max(1, count // stages)
        if self.parallel.schedule == "1f1b" and self.layout.chunks > 1 and count % rounds:
            raise ConfigError(
                f"such that the {count} micro-batches of a step divide into {rounds} equal rounds; "
                f"a multiple of parallel.pp ({stages}) always does",
                key="train.micro_batch_size",
                value=self.micro_batch_size,
                hint=f"nearest: train.batch_size = {nearest_multiple(count, stages) * self.train.batch_size // count}",
            )
        if self.parallel.schedule == "1f1b" and count < stages:
            raise ConfigError(
                f"such that a step has at least parallel.pp ({stages}) micro-batches",
                key="train.micro_batch_size",
                value=self.micro_batch_size,
                hint=f"batch_size / (data ranks * micro_batch_size) is {count}",
            )

    def _check_sequence(self) -> None:
        length, parts = self.data.sequence_length, self.layout.tp
        if self.layout.sequence and length % parts:
            raise ConfigError(
                f"a multiple of parallel.tp ({parts}), whose ranks split the tokens",
                key="data.sequence_length",
                value=length,
                hint=f"nearest: {nearest_multiple(length, parts)}, or parallel.sequence_parallel = false",
            )

    def _check_batch(self) -> None:
        batch, world = self.train.batch_size, self.layout.data_ranks
        if batch % world:
            expected = f"a multiple of the {world} data-parallel ranks"
            model_ranks = self.layout.tp * self.layout.pp
            if model_ranks > 1:
                expected += (
                    f" (launch.processes * launch.nodes = {self.world}, "
                    f"over parallel.tp * parallel.pp = {model_ranks})"
                )
            raise ConfigError(
                expected,
                key="train.batch_size",
                value=batch,
                hint=f"nearest: {nearest_multiple(batch, world)}",
            )
        share = self.train.micro_batch_size * world
        if share and batch % share:
            raise ConfigError(
                f"a divisor of {batch // world}, the samples of one rank in a batch",
                key="train.micro_batch_size",
                value=self.train.micro_batch_size,
            )

    def _check_data(self, base: Path) -> None:
        for index, source in enumerate(self.data.sources):
            key = f"data.sources[{index}]"
            try:
                kind = source_of_entry(source)
            except KeyError:
                names = " or ".join(repr(name) for name in builtin_names())
                raise ConfigError(names, key=key, value=source) from None
            kind.check(source, base=base, key=key)
        tokenizer, quarantine = _path(base, self.data.tokenizer), _path(base, self.data.quarantine)
        if self.data.tokenizer not in TRAINED and not os.path.isfile(tokenizer):
            raise ConfigError(
                '"bytes", "bpe" or an existing tokenizer.json',
                key="data.tokenizer",
                value=self.data.tokenizer,
                hint=why_unreachable(tokenizer),
            )
        if self.data.quarantine and not os.path.isfile(quarantine):
            raise ConfigError(
                "an existing file with one sample id per line",
                key="data.quarantine",
                value=self.data.quarantine,
                hint=why_unreachable(quarantine) or "guardrail report RUN --quarantine writes one",
            )
        if not self.data.cache:
            return
        why = why_unreachable(_path(base, self.data.cache))
        if why:
            raise ConfigError(
                "a folder that can be created", key="data.cache", value=self.data.cache, hint=why
            )

    def check_machine(self) -> None:
        """Raise ConfigError for missing packages, or for snapshots that exceed this node's memory."""
        for package in ("accelerate", "tokenizers"):
            if not is_installed(package):
                raise ConfigError(
                    f"an installed {package}",
                    key="launch.trainer",
                    value=self.launch.trainer,
                    hint=install_hint(package),
                )
        layout = self.layout
        # A pipeline stage counts as an equal part of the model.
        shards = layout.dp_shard * layout.tp * layout.pp
        one = state_bytes(
            self.model,
            self.vocabulary,
            moments=self.optim.spec.moments,
            shards=shards,
            sequence_length=self.data.sequence_length,
        )
        keep, processes, memory = self.snapshots.keep, self.launch.processes, memory_bytes()
        needed = one * keep * processes
        if needed <= memory:
            return
        advice = "0 needs no memory; a rollback then loads a checkpoint"
        fit = memory // (one * processes)
        if fit >= 2:
            advice = f"{fit} would fit"
        raise ConfigError(
            f"snapshots that fit into {format_gib(memory)} of memory",
            key="snapshots.keep",
            value=keep,
            hint=f"{keep} snapshots x {processes} processes x {format_gib(one)} need "
            f"{format_gib(needed)}; {advice}",
        )

    @property
    def vocabulary(self) -> int:
        """Token ids of the configured tokenizer, before it is trained; an upper bound for "bpe"."""
        if self.data.tokenizer == "bytes":
            return BYTE_IDS
        if self.data.tokenizer == "bpe":
            return self.data.vocabulary
        try:
            model = json.loads(Path(self.data.tokenizer).read_text(encoding="utf-8"))["model"]
            return len(model["vocab"])
        except (OSError, ValueError, KeyError, TypeError):
            # Loading the file raises an error that says what is wrong with it.
            return self.data.vocabulary


def memory_bytes() -> int:
    """Return the physical memory of this node, or the limit of its container if that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no container, or "max"
            continue
    return memory


def _refuse(forbidden: Mapping[str, tuple[object, bool, str]], *, instead: str) -> None:
    """Raise ConfigError for the first key with a forbidden value.

    Args:
        forbidden: key -> (its value, whether that is forbidden, what is expected).
        instead: the setting to change otherwise.
    """
    for key, (value, bad, expected) in forbidden.items():
        if bad:
            raise ConfigError(f"{expected}, or {instead}", key=key, value=value)


def _absolute(base: Path, path: str, *, but: Container[str] = ()) -> str:
    """Return an absolute path; "" and the values in `but` stay as they are."""
    if not path or path in but:
        return path
    return str(_path(base, path))


def _path(base: Path, path: str) -> Path:
    return base / os.path.expanduser(path)
