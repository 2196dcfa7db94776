"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): a rank has some heads and hidden units.

Column-parallel are q, k, v, gate, up and the output matrix: their outputs are split. Row-parallel
are out and down, whose partial sums the group adds up, and the embedding, of which a rank has some
token ids. Every rank has the complete residual stream, norms and position tables, and computes them
alike.

With sequence parallelism (Korthikanti et al. 2022) a rank has the stream of some tokens only, from
the embedding to the output matrix; norms and dropout work on those. The parts are gathered at the
start of a sublayer, and its sum is scattered at the end. That sends as many bytes as the sum over
complete streams, and keeps only a part of the activations.

Shape suffixes: B batch, T tokens (S of this rank), D width, N = B T, V vocabulary, W the ids of
this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trainer.model import Decoder
from trainer.model.positions import Alibi
from trainer.objectives.loss import IGNORED

COLUMNS = ("attention.q", "attention.k", "attention.v", "feed_forward.gate", "feed_forward.up")
ROWS = ("attention.out", "feed_forward.down")
NORMS = ("attention_norm", "attention_after", "feed_forward_norm", "feed_forward_after")

LossSum = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def split_model(model: Decoder, mesh: DeviceMesh, *, sequence: bool = False) -> LossSum:
    """Split a new model over the ranks of a 1-d mesh, in place.

    Afterwards `model(tokens)` gives [B, T, W]: the logits of the token ids of this rank.

    Args:
        sequence: whether the stream is split by tokens too, in equal parts of T.

    Returns:
        The function for the loss of the split logits.
    """
    vocabulary = model.embedding.num_embeddings
    stream: Placement = Replicate()
    if sequence:
        stream = Shard(1)
    for block in model.blocks:
        parallelize_module(block, mesh, _plan(block, stream))
        # FSDP warns of a block whose output is a view.
        if sequence and model.section.norm_place == "post":
            cast(nn.Module, block.feed_forward_norm).register_forward_hook(
                lambda _m, _i, x: x.clone()
            )
    outer: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
    if model.head is not None:
        outer["head"] = ColwiseParallel()
    if model.norm is not None and sequence:
        outer["norm"] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, outer)
    model.project = partial(_project, model, mesh, stream)  # type: ignore[method-assign]
    if sequence:
        model.enter = partial(_enter, mesh)  # type: ignore[method-assign]
        model.stream_parts = mesh.size()
    if isinstance(model.bias, Alibi):
        model.bias.slopes_H = model.bias.slopes_H.chunk(mesh.size())[mesh.get_local_rank()].clone()
    mine = vocabulary_columns(vocabulary, place=mesh.get_local_rank(), ranks=mesh.size())
    return partial(loss_sum, first=mine.start, group=mesh.get_group())


def vocabulary_columns(vocabulary: int, *, place: int, ranks: int) -> range:
    """Return the token ids of one rank of a group, as DTensor splits them.

    The last ranks have fewer ids, or none.
    """
    size = -(-vocabulary // ranks)
    return range(min(place * size, vocabulary), min((place + 1) * size, vocabulary))


def _plan(block: nn.Module, stream: Placement) -> dict[str, Any]:
    """Return how each module of a block is split.

    A sublayer gathers its input once for all of its matrices. It adds up their gradients before the
    ranks do.

    Args:
        stream: placement of the stream between sublayers.
    """
    named = dict(block.named_modules())
    plan: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS if name in named}
    plan |= {name: RowwiseParallel(output_layouts=stream) for name in ROWS}
    for name, others in (("attention", (None,)), ("feed_forward", ())):
        layouts, gathered = (stream, *others), (Replicate(), *others)
        plan[name] = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=gathered)
    if stream.is_shard():
        plan |= {name: SequenceParallel(use_local_output=True) for name in NORMS if name in named}
    return plan


def _enter(mesh: DeviceMesh, x_BTD: Tensor) -> Tensor:
    """Return this rank's tokens [B, S, D] of a stream that all ranks have computed alike."""
    if x_BTD.shape[1] % mesh.size():
        raise ValueError(
            f"{x_BTD.shape[1]} tokens: not a multiple of {mesh.size()}, the ranks that split them"
        )
    replicated = DTensor.from_local(x_BTD, mesh, [Replicate()])
    return replicated.redistribute(placements=[Shard(1)]).to_local()


def _project(model: Decoder, mesh: DeviceMesh, stream: Placement, x: Tensor) -> Tensor:
    """Return the logits of this rank's rows of the output matrix.

    The backward pass adds up the parts of x's gradient.
    """
    output: nn.Module = model.embedding
    if model.head is not None:
        output = model.head
    weight = cast(DTensor, output.weight)
    gathered = DTensor.from_local(x, mesh, [stream]).redistribute(placements=[Replicate()])
    return F.linear(gathered.to_local(grad_placements=[Partial()]), weight.to_local())


def loss_sum(
    logits_BTW: Tensor, labels_BT: Tensor, *, first: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the loss sum of logits that the ranks of `group` hold in parts, equal on all of them.

    See `trainer.objectives.loss.loss_sum`.

    Args:
        first: id of this rank's first column.
    """
    logits_NW = logits_BTW.flatten(0, -2)
    if logits_NW.dtype not in (torch.float32, torch.float64):
        logits_NW = logits_NW.float()
    total = _SplitCrossEntropy.apply(logits_NW, labels_BT.flatten(), first, group)
    return cast(Tensor, total), (labels_BT != IGNORED).sum()


class _SplitCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of split logits: three numbers per token are sent, never the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_NW: Tensor, labels_N: Tensor, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        count, width = logits_NW.shape
        highest_N = logits_NW.new_full((count,), -torch.inf)
        if width:
            highest_N = logits_NW.amax(1)
        dist.all_reduce(highest_N, dist.ReduceOp.MAX, group)
        shares_NW = (logits_NW - highest_N[:, None]).exp_()
        column_N = labels_N - first
        mine_N = (column_N >= 0) & (column_N < width)
        column_N = column_N.where(mine_N, 0)
        target_N = torch.zeros_like(highest_N)
        if width:
            target_N = logits_NW.gather(1, column_N[:, None])[:, 0]
        sums = torch.stack([shares_NW.sum(1), torch.where(mine_N, target_N - highest_N, 0.0)])
        dist.all_reduce(sums, group=group)
        counted_N = labels_N != IGNORED
        losses_N = sums[0].log() - sums[1]
        ctx.save_for_backward(shares_NW.div_(sums[0][:, None]), column_N, mine_N, counted_N)
        return torch.where(counted_N, losses_N, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        shares_NW, column_N, mine_N, counted_N = ctx.saved_tensors
        gradient_NW = shares_NW.clone()
        if gradient_NW.shape[1]:
            gradient_NW.scatter_add_(1, column_N[:, None], -mine_N[:, None].to(gradient_NW.dtype))
        # `where`, not a product: an ignored row may hold NaN.
        gradient_NW = torch.where(counted_N[:, None], gradient_NW * gradients[0], 0.0)
        return gradient_NW, None, None, None
