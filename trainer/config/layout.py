"""The mesh of ranks: replicas, shards, tensor-parallel groups, pipeline stages. Imports no torch."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from guardrail.core.errors import ConfigError
from guardrail.core.section import Natural, Positive, Section
from trainer.config.recipe import ModelSection, OptimSection, nearest_multiple
from trainer.config.sizes import hidden_width
from trainer.optim.registry import names_of

if TYPE_CHECKING:
    from trainer.config.sections import TrainSection


class ParallelSection(Section, frozen=True, kw_only=True):
    """[parallel]: the mesh of ranks. pp x dp_replicate x dp_shard x tp = launch.processes x nodes.

    train.strategy assigns the ranks that dp_replicate = 0 and dp_shard = 0 leave open: "ddp" makes
    replicas of them, "fsdp" shards.
    """

    # Copies of the complete training state; their gradients are averaged (HSDP with shards, DDP
    # without). 0: the ranks that are left.
    dp_replicate: Natural = 0
    # Ranks that share one copy of parameters, gradients and optimizer state (ZeRO, FSDP2). 0: the
    # ranks that are left.
    dp_shard: Natural = 0
    # Ranks that share the heads and hidden units of each layer (Megatron-LM); they are consecutive.
    tp: Positive = 1
    # For tensor-parallel groups: split the tokens of the residual stream too, with its norms and
    # dropout. Same traffic, less memory for activations.
    sequence_parallel: bool = False
    # Stages of the pipeline, each with consecutive blocks, and the order of their passes. "gpipe": all
    # forward passes first. "1f1b": one forward and one backward pass in turn (PipeDream-flush), which
    # keeps fewer activations.
    pp: Positive = 1
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    # For pipelines: groups of consecutive blocks per stage, assigned to the stages in turn
    # (Megatron's model chunks: interleaved 1F1B, or breadth-first with gpipe). The pipeline idles for
    # the time of a chunk instead of a stage, and sends that many times more.
    chunks: Positive = 1
    # For shards: drop gathered parameters after the forward pass and gather them again for the
    # backward pass (ZeRO-3), or keep them (ZeRO-2: more memory, less traffic).
    reshard_after_forward: bool = True
    # For shards: keep parameters, gradients and optimizer state in host memory. The optimizer runs
    # there.
    cpu_offload: bool = False


class Layout(Struct, frozen=True, kw_only=True):
    """Sizes of the mesh, slowest dimension first.

    rank = ((stage * dp_replicate + replicate) * dp_shard + shard) * tp + place in the
    tensor-parallel group.

    Attributes:
        chunks: groups of consecutive blocks per stage, see `chunk_numbers`.
        sharded: whether FSDP2 holds the state, even on one shard; else DDP, or a single rank.
        sequence: whether a tensor-parallel group splits the tokens of the stream.
    """

    pp: int
    chunks: int
    dp_replicate: int
    dp_shard: int
    tp: int
    sharded: bool
    sequence: bool

    @classmethod
    def from_section(cls, section: ParallelSection, *, world: int, strategy: str) -> Layout:
        """Return the layout of `world` ranks. Raises ConfigError if they do not fill the mesh."""
        replicate, shard = section.dp_replicate, section.dp_shard
        given = max(replicate, 1) * max(shard, 1) * section.tp * section.pp
        is_full = bool(replicate and shard)
        if world % given or (is_full and given != world):
            relation = "divisor"
            if is_full:
                relation = "product"
            raise ConfigError(
                f"a {relation} of {world}, the number of processes",
                key="parallel",
                value=given,
                hint=f"pp = {section.pp}, tp = {section.tp}, dp_replicate = {replicate}, dp_shard = {shard}",
            )
        rest = world // given
        if not replicate and not shard:
            replicate, shard = rest, 1
            if strategy == "fsdp":
                replicate, shard = 1, rest
        layout = cls(
            pp=section.pp,
            chunks=section.chunks,
            dp_replicate=replicate or rest,
            dp_shard=shard or rest,
            tp=section.tp,
            sequence=section.sequence_parallel,
            sharded=strategy == "fsdp" or (shard or rest) > 1 or section.tp * section.pp > 1,
        )
        layout._check(section)
        return layout

    def check_model(self, model: ModelSection, optim: OptimSection, train: TrainSection) -> None:
        """Raise ConfigError for a model that tensor-parallel groups or pipelines cannot split."""
        if self.pp > model.layers:
            raise ConfigError(
                f"at most model.layers ({model.layers})", key="parallel.pp", value=self.pp
            )
        if self.pp * self.chunks > model.layers:
            expected = f"at most model.layers / parallel.pp ({model.layers // self.pp}), a block for each chunk"
            raise ConfigError(expected, key="parallel.chunks", value=self.chunks)
        if self.world == self.data_ranks:
            return
        counts = (
            ("heads", model.heads),
            ("kv_heads", model.groups),
            ("hidden", hidden_width(model)),
        )
        for key, count in counts:
            if count % self.tp:
                raise ConfigError(
                    f"a multiple of parallel.tp ({self.tp})",
                    key=f"model.{key}",
                    value=count,
                    hint=f"nearest: {nearest_multiple(count, self.tp)}",
                )
        together: dict[str, tuple[Any, ...]] = {
            "model.hf": (model.hf, ""),
            "model.kind": (model.kind, "decoder", "prefix"),
            "model.positions": (model.positions, "rope", "learned", "sinusoidal", "alibi", "none"),
            "model.qk_norm": (model.qk_norm, False),
            "optim.name": (optim.name, *names_of(having="works_with_model_parallel")),
            "optim.qk_clip": (optim.qk_clip, 0.0),
            "train.z_loss": (train.z_loss, 0.0),
        }
        if self.pp > 1:
            together |= {
                "model.kind": (model.kind, "decoder"),
                "model.tied": (model.tied, False),
                "train.objective": (train.objective, "lm"),
                "train.batch_ramp.start": (train.batch_ramp.start, 0),
            }
        for key, (value, *possible) in together.items():
            if value not in possible:
                expected = " or ".join(json.dumps(one) for one in possible)
                hint = f"parallel.tp = {self.tp}, parallel.pp = {self.pp} do not work with it"
                raise ConfigError(expected, key=key, value=value, hint=hint)

    def _check(self, section: ParallelSection) -> None:
        if self.sequence and self.tp == 1:
            raise ConfigError(
                "false, or parallel.tp above 1",
                key="parallel.sequence_parallel",
                value=True,
                hint="with one rank per group there is nothing to split",
            )
        if self.chunks > 1 and self.pp == 1:
            raise ConfigError(
                "1, or parallel.pp above 1",
                key="parallel.chunks",
                value=self.chunks,
                hint="there are no stages",
            )
        if self.sharded:
            return
        for key, value in (("reshard_after_forward", True), ("cpu_offload", False)):
            if getattr(section, key) is not value:
                raise ConfigError(
                    f"{str(value).lower()}, or shards",
                    key=f"parallel.{key}",
                    value=not value,
                    hint='set parallel.dp_shard above 1 or train.strategy = "fsdp"',
                )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.data_ranks * self.tp

    def stage_of(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // (self.data_ranks * self.tp)

    def blocks_of_stages(self, layers: int) -> list[list[int]]:
        """Return the numbers of the blocks of each stage."""
        blocks = []
        for stage in range(self.pp):
            chunks = chunk_blocks(layers, stage=stage, stages=self.pp, chunks=self.chunks)
            blocks.append(list(chain(*chunks)))
        return blocks

    def rng_part(self, rank: int, chunk: int = 0) -> int:
        """Return which dropout masks a rank draws in a pass; ranks with the same part draw the same.

        Without sequence parallelism each rank of a tensor-parallel group has the complete stream
        and must drop the same entries.
        """
        number = chunk_numbers(stage=self.stage_of(rank), stages=self.pp, chunks=self.chunks)[chunk]
        if self.sequence:
            return number * self.tp + rank % self.tp
        return number

    def shard_ranks(self, rank: int) -> range | None:
        """Return the ranks of the same stage; None: there is one stage."""
        if self.pp == 1:
            return None
        size = self.data_ranks * self.tp
        first = self.stage_of(rank) * size
        return range(first, first + size)

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Return which share of the data a rank reads.

        All ranks of a tensor-parallel group and of a pipeline read the same share.
        """
        return rank // self.tp % self.data_ranks

    def counts_loss(self, rank: int) -> bool:
        """Return whether the loss and tokens of a rank enter the sums over all ranks.

        One rank per share of the data counts.
        """
        return rank % self.tp == 0 and self.stage_of(rank) == self.pp - 1


def chunk_numbers(*, stage: int, stages: int, chunks: int) -> range:
    """Return which of all chunks a stage has; they are assigned in turn, in the model's order."""
    return range(stage, stages * chunks, stages)


def chunk_blocks(layers: int, *, stage: int, stages: int, chunks: int = 1) -> list[range]:
    """Return the numbers of the blocks of each chunk of a pipeline stage."""
    cuts = [number * layers // (stages * chunks) for number in range(stages * chunks + 1)]
    return [
        range(cuts[at], cuts[at + 1])
        for at in chunk_numbers(stage=stage, stages=stages, chunks=chunks)
    ]
