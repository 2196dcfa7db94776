"""How the ranks of a run stand to one another: replicas, shards and tensor-parallel groups. Imports no torch."""

from __future__ import annotations

from msgspec import Struct

from guardrail.config import Natural, Section
from guardrail.errors import ConfigError


class ParallelSection(Section, frozen=True, kw_only=True):
    """[parallel]: the mesh of ranks, dp_replicate x dp_shard = launch.processes * launch.nodes.

    Both 0 leave it to train.strategy: "ddp" makes every rank a replica, "fsdp" every rank a shard.
    """

    # Copies of the whole training state, whose gradients are averaged (HSDP beside shards; DDP without); 0: the rest.
    dp_replicate: Natural = 0
    # Ranks that share one copy of parameters, gradients and optimizer state (ZeRO, FSDP2); 0: the rest.
    dp_shard: Natural = 0
    # Shards: drop gathered parameters after the forward pass and gather them again for the backward pass (ZeRO-3), or
    # keep them in between (ZeRO-2: more memory, less traffic).
    reshard_after_forward: bool = True
    # Shards: keep parameters, gradients and optimizer state in host memory; the optimizer steps there.
    cpu_offload: bool = False


class Layout(Struct, frozen=True, kw_only=True):
    """Sizes of the mesh, slowest dimension first: rank = replicate * dp_shard + shard.

    Attributes:
        sharded: FSDP2 holds the state, be it on one shard; else DDP, or nothing on a single rank.
    """

    dp_replicate: int
    dp_shard: int
    sharded: bool

    @classmethod
    def of(cls, section: ParallelSection, *, world: int, strategy: str) -> Layout:
        """The layout of `world` ranks. Raises ConfigError where they do not fill the mesh."""
        replicate, shard = section.dp_replicate, section.dp_shard
        given = max(replicate, 1) * max(shard, 1)
        full = bool(replicate and shard)
        if world % given or (full and given != world):
            raise ConfigError(
                f"a {'product' if full else 'divisor'} of {world}, the number of processes",
                key="parallel.dp_shard" if shard else "parallel.dp_replicate",
                value=shard or replicate,
                hint=f"parallel.dp_replicate = {replicate}, parallel.dp_shard = {shard} (0: the rest)",
            )
        rest = world // given
        if not replicate and not shard:
            replicate, shard = (1, rest) if strategy == "fsdp" else (rest, 1)
        layout = cls(
            dp_replicate=replicate or rest,
            dp_shard=shard or rest,
            sharded=strategy == "fsdp" or (shard or rest) > 1,
        )
        layout._check(section)
        return layout

    def _check(self, section: ParallelSection) -> None:
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
    def data_ranks(self) -> int:
        """Ranks that read data of their own."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which share of the data a rank reads."""
        return rank
