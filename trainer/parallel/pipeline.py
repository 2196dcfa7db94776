"""Pipeline parallelism by torch.distributed.pipelining: each rank has some consecutive blocks.

GPipe (Huang et al. 2019) runs all forward passes, then all backward ones. 1F1B (PipeDream-flush,
Narayanan et al. 2021) alternates them, so a stage keeps the activations of as many micro-batches as
there are later stages. With several chunks per stage, assigned in turn, a micro-batch visits the
ranks once for each chunk: interleaved 1F1B (the same paper, section 2.2.2) and breadth-first GPipe
(Lamy-Poirier 2022). All of them accumulate the gradients of a step and reduce them once, at its
end.

Shape suffixes: B rows of a micro-batch, T tokens, D width, W token ids of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from trainer.config.layout import chunk_blocks, chunk_numbers
from trainer.model import Decoder
from trainer.model.attention import AttentionMask

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
OF_CHUNKS: dict[str, Any] = {"gpipe": ScheduleLoopedBFS, "1f1b": ScheduleInterleaved1F1B}


class OtherStage(nn.Module):
    """Replaces a block of another stage, so that the blocks here keep their numbers and names."""

    def forward(self, x_BTD: Tensor, _sight: AttentionMask) -> Tensor:
        return x_BTD


@dataclass(frozen=True, kw_only=True)
class StagePosition:
    """The position of a rank in its pipeline.

    Attributes:
        stage, stages: its number, and the number of stages.
        chunks: groups of consecutive blocks per stage.
        group: the ranks of this pipeline, first stage first.
    """

    stage: int
    stages: int
    chunks: int = 1
    group: dist.ProcessGroup

    @property
    def first(self) -> bool:
        """Whether the embedding is here."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether the head is here."""
        return self.stage == self.stages - 1

    @property
    def numbers(self) -> range:
        """Numbers of the chunks of this rank, in the order of the model."""
        return chunk_numbers(stage=self.stage, stages=self.stages, chunks=self.chunks)

    @property
    def end(self) -> int:
        """The number of the chunk with the head."""
        return self.stages * self.chunks - 1

    def blocks_of_chunks(self, layers: int) -> list[range]:
        """Return the numbers of the blocks of each chunk."""
        return chunk_blocks(layers, stage=self.stage, stages=self.stages, chunks=self.chunks)


def cut_model(model: Decoder, place: StagePosition) -> None:
    """Remove from a model what other stages have.

    The first stage keeps the embedding, the last one the head. Afterwards `model` maps (token ids
    [B, T] or the stream [B, T, D], number of a chunk of this rank) to the stream or to logits. Call
    it before the model is sharded.
    """
    own = place.blocks_of_chunks(len(model.blocks))
    for number in set(range(len(model.blocks))) - set(chain(*own)):
        model.blocks[number] = OtherStage()
    if not place.first:
        model.embedding = OtherStage()  # type: ignore[assignment]
        model.embedding_norm = model.absolute = None
    if not place.last:
        model.norm = model.head = None

    def forward(x: Tensor, chunk: int) -> Tensor:
        number = place.numbers[chunk]
        x_BTD = x
        if number == 0:
            x_BTD = model.embed(x)
        mask = model.mask(x_BTD.shape[1] * model.stream_parts, x_BTD.device)
        blocks = [model.blocks[block] for block in own[chunk]]
        x_BTD = model.run(blocks, x_BTD, AttentionMask(mask=mask, rotary=model.rotary))
        if number == place.end:
            return model.logits(x_BTD)
        return x_BTD

    model.forward = forward  # type: ignore[assignment, method-assign]


class Chunk(nn.Module):
    """One chunk of a rank's model, which torch's schedule calls a stage.

    Args:
        model: what `cut_model` has kept, sharded or not; of all chunks of this rank.
        index: number of this chunk on its rank.
        begin: called with the number of a micro-batch and `index` before its forward pass; sets the
            RNG state.

    Attributes:
        next: micro-batch of the next forward pass; None: of no step, and `begin` is not called.
    """

    def __init__(self, model: nn.Module, index: int, begin: Callable[[int, int], None]) -> None:
        super().__init__()
        self.model, self.index = model, index
        self._begin = begin
        self.next: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.next is not None:
            self._begin(self.next, self.index)
            # Every schedule runs the micro-batches of a chunk in order, forward and backward.
            self.next += 1
        return cast(Tensor, self.model(x, self.index))


class Pipeline:
    """One rank's part in the passes of a pipeline over the micro-batches of a step.

    Args:
        model: what `cut_model` has kept, sharded by FSDP2 (one shard is possible).
        place: of this rank.
        schedule: "gpipe" or "1f1b".
        micro_batches, rows, length: number of micro-batches of a step; B and T of each.
        stream: tokens and width that stages send: T (with sequence parallelism a part of it) and D.
        outputs: W, on the last stage.
        begin: see Chunk.
        loss: (micro-batch, logits, labels) -> the start of the backward pass, on the last stage.
    """

    def __init__(
        self,
        model: nn.Module,
        place: StagePosition,
        *,
        schedule: str,
        micro_batches: int,
        rows: int,
        length: int,
        stream: tuple[int, int],
        outputs: int,
        device: torch.device,
        begin: Callable[[int, int], None],
        loss: Callable[[int, Tensor, Tensor], Tensor],
    ) -> None:
        self.model, self.place, self.stream, self.device = model, place, stream, device
        self._loss, self._lost = loss, 0
        between = torch.empty(rows, *stream, device="meta", requires_grad=True)
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        logits = torch.empty(rows, length, outputs, device="meta", requires_grad=True)

        def stage(module: nn.Module, number: int) -> PipelineStage:
            return PipelineStage(
                module,
                number,
                place.end + 1,
                device,
                # Given here; torch would else run a pass to find them, which changes the RNG state
                # and calls hooks.
                input_args=tokens if number == 0 else between,
                output_args=logits if number == place.end else between,
                group=place.group,
            )

        self._chunks = [Chunk(model, index, begin) for index in range(place.chunks)]
        stages = [
            stage(chunk, number) for chunk, number in zip(self._chunks, place.numbers, strict=True)
        ]
        options = {"loss_fn": self._lose, "scale_grads": False}
        if place.chunks == 1:
            self._schedule = SCHEDULES[schedule](stages[0], micro_batches, **options)
        else:
            self._schedule = OF_CHUNKS[schedule](stages, micro_batches, **options)
        # A chunk is no sharded module, so the schedule leaves gathering and reducing to the model.
        # This stage is all of the model; it reduces the gradients of a step when they are complete.
        self._reducer = stage(model, place.stage)

    def train(self, tokens: Tensor, labels: Tensor) -> None:
        """Run forward and backward of a step, [micro_batches * B, T] each, and reduce gradients."""
        sharded = cast(FSDPModule, self.model)
        sharded.set_is_last_backward(False)
        sharded.set_reshard_after_backward(False)
        sharded.set_requires_gradient_sync(False)
        self._lost = 0
        self._next(0)
        try:
            inputs, targets = [], {}
            if self.place.first:
                inputs = [tokens]
            if self.place.last:
                targets = {"target": labels}
            self._schedule.step(*inputs, **targets, return_outputs=False)
        finally:
            self._next(None)
        self._reducer.perform_reduce_grad(1)

    @torch.no_grad()
    def forward(self, tokens: Tensor, *, again: int | None = None) -> Tensor | None:
        """Return the logits of some rows on the last stage, None on the others. Collective.

        Args:
            again: number of the micro-batch of the last step that the rows are; its RNG state is
                set again. None: no RNG state is set.
        """
        place, logits = self.place, None
        self._next(again)
        for chunk, number in zip(self._chunks, place.numbers, strict=True):
            x = tokens
            if number > 0:
                x = torch.empty(len(tokens), *self.stream, device=self.device)
                dist.recv(x, group=place.group, group_src=(number - 1) % place.stages)
            y = cast(Tensor, chunk(x))
            if number == place.end:
                logits = y
            else:
                dist.send(y.contiguous(), group=place.group, group_dst=(number + 1) % place.stages)
        self._next(None)
        return logits

    def from_last(self, values: Tensor) -> Tensor:
        """Return the last stage's `values` on every stage. Collective."""
        dist.broadcast(values, group=self.place.group, group_src=self.place.stages - 1)
        return values

    def _next(self, micro_batch: int | None) -> None:
        """Set the micro-batch of the next forward pass of each chunk."""
        for chunk in self._chunks:
            chunk.next = micro_batch

    def _lose(self, logits: Tensor, labels: Tensor) -> Tensor:
        self._lost += 1
        return self._loss(self._lost - 1, logits, labels)
