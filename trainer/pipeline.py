"""Pipeline parallelism by torch.distributed.pipelining: a rank has a stretch of the blocks, micro-batches flow through.

GPipe (Huang et al. 2019) runs all forward passes, then all backward ones; 1F1B (PipeDream-flush, Narayanan et al. 2021)
alternates them, so that a stage keeps the activations of as many micro-batches as there are stages behind it. Both add
up the gradients of a window and reduce them once, at its end.

Shape suffixes: B rows of a micro-batch, T tokens, D width, W token ids of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from trainer.layout import stretch
from trainer.model import Decoder
from trainer.model.attention import Sight

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Elsewhere(nn.Module):
    """Stands for a block of another stage, so that the blocks here keep their numbers and names."""

    def forward(self, x_BTD: Tensor, _sight: Sight) -> Tensor:
        return x_BTD


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands in its pipeline.

    Attributes:
        stage, stages: its number, and how many there are.
        group: the ranks of this pipeline, first stage first.
    """

    stage: int
    stages: int
    group: dist.ProcessGroup

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def blocks(self, layers: int) -> range:
        """Numbers of the blocks of this stage."""
        return stretch(layers, stage=self.stage, stages=self.stages)


def cut(model: Decoder, place: Place) -> None:
    """Leave of a whole model what this stage has: its blocks, the embedding at the beginning, the head at the end.

    `model` maps token ids [B, T] or the stream [B, T, D] to the stream or to logits afterwards. Call it before the
    model is sharded.
    """
    mine = place.blocks(len(model.blocks))
    for number in set(range(len(model.blocks))) - set(mine):
        model.blocks[number] = Elsewhere()
    if not place.first:
        model.embedding = Elsewhere()  # type: ignore[assignment]
        model.embedding_norm = model.absolute = None
    if not place.last:
        model.norm = model.head = None

    def forward(x: Tensor) -> Tensor:
        x_BTD = model.embed(x) if place.first else x
        mask = model.mask(x_BTD.shape[1] * model.stream_parts, x_BTD.device)
        x_BTD = model.run(model.blocks, x_BTD, Sight(mask=mask, rotary=model.rotary))
        return model.logits(x_BTD) if place.last else x_BTD

    model.forward = forward  # type: ignore[assignment, method-assign]


class Pipeline:
    """One rank's part in the schedule of a window of micro-batches.

    Args:
        model: what `cut` left, sharded or not.
        place: of this rank.
        schedule: "gpipe" or "1f1b".
        micro_batches, rows, length: of a window: how many, B and T of each.
        stream: tokens and width of what travels between stages, T (with sequence parallelism a part of it) and D.
        outputs: W, on the last stage.
        begin: called with the number of a micro-batch before its forward pass: throws the dice.
        loss: (number, logits, labels) -> what the backward pass begins with, on the last stage.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Place,
        *,
        schedule: str,
        micro_batches: int,
        rows: int,
        length: int,
        stream: tuple[int, int],
        outputs: int,
        device: torch.device,
        begin: Callable[[int], None],
        loss: Callable[[int, Tensor, Tensor], Tensor],
    ) -> None:
        self.model, self.place, self.stream, self.device = model, place, stream, device
        self._begin, self._loss = begin, loss
        self._begun = self._lost = 0
        self._training = False
        model.register_forward_pre_hook(self._before)
        between = torch.empty(rows, *stream, device="meta", requires_grad=True)
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        logits = torch.empty(rows, length, outputs, device="meta", requires_grad=True)
        stage = PipelineStage(
            model,
            place.stage,
            place.stages,
            device,
            # Given here, so that torch runs no pass of its own to find them out, which would move dice and hooks.
            input_args=tokens if place.first else between,
            output_args=logits if place.last else between,
            group=place.group,
        )
        self._schedule = SCHEDULES[schedule](stage, micro_batches, loss_fn=self._lose, scale_grads=False)

    def train(self, tokens: Tensor, labels: Tensor) -> None:
        """Forward and backward of a window, [micro_batches * B, T] each, gradients reduced at the end."""
        self._begun = self._lost = 0
        self._training = True
        try:
            inputs = (tokens,) if self.place.first else ()
            targets = {"target": labels} if self.place.last else {}
            self._schedule.step(*inputs, **targets, return_outputs=False)
        finally:
            self._training = False

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor | None:
        """Logits of some rows, on the last stage; None on the others. Every rank of the pipeline calls it."""
        x = tokens
        if not self.place.first:
            x = torch.empty(len(tokens), *self.stream, device=self.device)
            dist.recv(x, group=self.place.group, group_src=self.place.stage - 1)
        y = cast(Tensor, self.model(x))
        if self.place.last:
            return y
        dist.send(y.contiguous(), group=self.place.group, group_dst=self.place.stage + 1)
        return None

    def from_last(self, values: Tensor) -> Tensor:
        """The last stage's `values` on every stage."""
        dist.broadcast(values, group=self.place.group, group_src=self.place.stages - 1)
        return values

    def _before(self, _module: nn.Module, _inputs: Any) -> None:
        # Either schedule takes the micro-batches in order, forward and backward.
        if self._training:
            self._begin(self._begun)
            self._begun += 1

    def _lose(self, logits: Tensor, labels: Tensor) -> Tensor:
        self._lost += 1
        return self._loss(self._lost - 1, logits, labels)
