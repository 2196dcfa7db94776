"""The training objective and the arithmetic that makes accumulation exact.

The loss of a batch is the mean over its label tokens, wherever they lie. A rank backpropagates each micro-batch's
*sum* divided by a constant (`nominal`); the mean that ddp and fsdp take over the ranks turns that into the global
sum divided by the nominal number of tokens, and once the step's one all-reduce has told the real number, every
gradient is multiplied by `correction`, together with the clip coefficient. So the update is the same however the
batch is cut into ranks and micro-batches, short or half-ignored ones included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that teaches nothing: padding, the first token of a document


def loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a micro-batch, in nats, and its number of label tokens.

    Args:
        logits: [B, T, V]; below fp32 they are raised to it first, which copies them.
        labels: [B, T] int64, IGNORED where there is nothing to learn.

    Returns:
        A 0-d tensor in fp32 (float64 for float64 logits) and a 0-d int64 tensor, both on the device of the logits:
        nothing here waits for it. With every label ignored the sum is 0.0 and so are its gradients (not 0/0).
    """
    logits_NV = logits.flatten(0, -2)
    if logits_NV.dtype not in (torch.float32, torch.float64):
        logits_NV = logits_NV.float()
    total = F.cross_entropy(logits_NV, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def nominal_tokens(*, batch_size: int, sequence_length: int, world: int) -> float:
    """What a rank divides each micro-batch's `loss_sum` by before its backward pass.

    The label tokens of a full global batch over the number of ranks: a constant of the run, because the true
    number is only known once all ranks have counted.
    """
    return batch_size * sequence_length / world


def correction(*, batch_size: int, sequence_length: int, tokens: int) -> float:
    """Factor that turns reduced gradients over nominal tokens into those of the mean over `tokens`.

    Args:
        tokens: label tokens of the global batch that are not ignored; with 0 there is no gradient and no factor (1.0).
    """
    return batch_size * sequence_length / tokens if tokens else 1.0


def clip_coefficient(norm: float, limit: float) -> float:
    """Factor, at most 1, that brings a gradient of this L2 norm down to `limit` (0: no limit).

    Raises:
        ValueError: the norm is not finite. Dividing by it would turn the gradient into zeros or NaN without a word
        (pytorch#46849); such a step is to be refused, not clipped.
    """
    if not math.isfinite(norm):
        raise ValueError(f"a gradient of norm {norm} cannot be clipped")
    return min(1.0, limit / norm) if limit and norm else 1.0
