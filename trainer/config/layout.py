"""How the ranks of a run stand to one another: replicas, shards and tensor-parallel groups. Imports
no torch.
"""

from __future__ import annotations

import json
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
    """[parallel]: the mesh of ranks, pp x dp_replicate x dp_shard x tp = launch.processes *
    launch.nodes.

    dp_replicate and dp_shard at 0 are left to train.strategy: "ddp" fills up with replicas, "fsdp"
    with shards.
    """

    # Copies of the whole training state, whose gradients are averaged (HSDP beside shards; DDP
    # without); 0: the rest.
    dp_replicate: Natural = 0
    # Ranks that share one copy of parameters, gradients and optimizer state (ZeRO, FSDP2); 0: the
    # rest.
    dp_shard: Natural = 0
    # Ranks that share the work of each layer, heads and hidden units (Megatron-LM). They stand next
    # to one another.
    tp: Positive = 1
    # Tensor-parallel groups: share out the tokens of the residual stream as well, with its norms
    # and dropout. As much traffic, and a part of the activations.
    sequence_parallel: bool = False
    # Stages of a pipeline, each a stretch of the blocks, and the order in which it takes the
    # micro-batches of a window: GPipe, or one forward and one backward pass in turn
    # (PipeDream-flush), which keeps fewer activations.
    pp: Positive = 1
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    # Pipelines: stretches of blocks that each stage has, dealt out in turn (Megatron's model
    # chunks, interleaved 1F1B; breadth-first with gpipe). The pipeline idles for a chunk's time
    # instead of a stage's, for that much more traffic.
    chunks: Positive = 1
    # Shards: drop gathered parameters after the forward pass and gather them again for the backward
    # pass (ZeRO-3), or keep them in between (ZeRO-2: more memory, less traffic).
    reshard_after_forward: bool = True
    # Shards: keep parameters, gradients and optimizer state in host memory; the optimizer steps
    # there.
    cpu_offload: bool = False


class Layout(Struct, frozen=True, kw_only=True):
    """Sizes of the mesh, slowest dimension first.

    rank = ((stage * dp_replicate + replicate) * dp_shard + shard) * tp + place in the
    tensor-parallel group.

    Attributes:
        chunks: stretches of blocks that a stage has, see `numbers`.
        sharded: FSDP2 holds the state, be it on one shard; else DDP, or nothing on a single rank.
        sequence: a tensor-parallel group shares out the tokens of the stream.
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
        """The layout of `world` ranks. Raises ConfigError where they do not fill the mesh."""
        replicate, shard = section.dp_replicate, section.dp_shard
        given = max(replicate, 1) * max(shard, 1) * section.tp * section.pp
        full = bool(replicate and shard)
        if world % given or (full and given != world):
            raise ConfigError(
                f"a {'product' if full else 'divisor'} of {world}, the number of processes",
                key="parallel",
                value=given,
                hint=f"pp = {section.pp}, tp = {section.tp}, dp_replicate = {replicate}, dp_shard = {shard}",
            )
        rest = world // given
        if not replicate and not shard:
            replicate, shard = (1, rest) if strategy == "fsdp" else (rest, 1)
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
        """Refuse what tensor-parallel groups and pipelines cannot share out. Raises ConfigError."""
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
                hint = (
                    f"parallel.tp = {self.tp}, parallel.pp = {self.pp} work with nothing else here"
                )
                raise ConfigError(expected, key=key, value=value, hint=hint)

    def _check(self, section: ParallelSection) -> None:
        if self.sequence and self.tp == 1:
            raise ConfigError(
                "false, or parallel.tp above 1",
                key="parallel.sequence_parallel",
                value=True,
                hint="it splits nothing",
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
        return self.pp * self.data_ranks * self.tp

    def stage_of(self, rank: int) -> int:
        """Which stage of the pipeline a rank has."""
        return rank // (self.data_ranks * self.tp)

    def blocks_of_stages(self, layers: int) -> list[list[int]]:
        """Numbers of the blocks of each stage."""
        dealt = [
            chunk_blocks(layers, stage=stage, stages=self.pp, chunks=self.chunks)
            for stage in range(self.pp)
        ]
        return [[block for stretch in each for block in stretch] for each in dealt]

    def rng_part(self, rank: int, chunk: int = 0) -> int:
        """Which part of a micro-batch's pass a rank computes by dice of its own; equal where ranks
        compute the same.

        Without sequence parallelism a tensor-parallel group drops the same entries of the stream,
        which it has whole.
        """
        number = chunk_numbers(stage=self.stage_of(rank), stages=self.pp, chunks=self.chunks)[chunk]
        return number * self.tp + rank % self.tp if self.sequence else number

    def shard_ranks(self, rank: int) -> range | None:
        """The ranks of the same stage; None: there is one stage."""
        size = self.data_ranks * self.tp
        first = self.stage_of(rank) * size
        return None if self.pp == 1 else range(first, first + size)

    @property
    def data_ranks(self) -> int:
        """Ranks that read data of their own."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which share of the data a rank reads, the same for a whole tensor-parallel group and a
        whole pipeline.
        """
        return rank // self.tp % self.data_ranks

    def counts_loss(self, rank: int) -> bool:
        """Whether a rank's loss and tokens enter the sums over all ranks: once for each share of
        the data.
        """
        return rank % self.tp == 0 and self.stage_of(rank) == self.pp - 1


def chunk_numbers(*, stage: int, stages: int, chunks: int) -> range:
    """Which of all chunks, in the order of the model, one stage has: they are dealt out in turn."""
    return range(stage, stages * chunks, stages)


def chunk_blocks(layers: int, *, stage: int, stages: int, chunks: int = 1) -> list[range]:
    """Numbers of the blocks of each chunk of one stage of a pipeline."""
    cuts = [number * layers // (stages * chunks) for number in range(stages * chunks + 1)]
    return [
        range(cuts[at], cuts[at + 1])
        for at in chunk_numbers(stage=stage, stages=stages, chunks=chunks)
    ]
