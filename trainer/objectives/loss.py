"""The loss, and the arithmetic that makes accumulation exact.

The loss of a batch is the mean over its label tokens on all ranks. A rank backpropagates the *sum*
of each micro-batch times world / nominal. `nominal` is a constant: the tokens of a full global
batch. ddp and fsdp average over the ranks, which gives the global sum / nominal. The one all-reduce
of a step gives the number of label tokens. The guard then multiplies the gradients by
nominal / tokens, together with the clip coefficient. The update is therefore the same for every
division into ranks and micro-batches, also for short batches and ignored labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that does not count, such as padding


def loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of a micro-batch, in nats, and its number of label tokens.

    Args:
        logits: [B, T, V]; 16-bit ones are converted to fp32, which copies them.
        labels: [B, T] int64, IGNORED where a label does not count.

    Returns:
        A 0-d tensor in fp32 (float64 for float64 logits) and a 0-d int64 tensor, both on the device
        of the logits, without waiting for it. If every label is ignored, the sum and its gradients
        are 0.0 (not 0/0).
    """
    logits_NV = logits.flatten(0, -2)
    if logits_NV.dtype not in (torch.float32, torch.float64):
        logits_NV = logits_NV.float()
    labels_N = labels.flatten()
    logits_NV = _WithoutIgnored.apply(logits_NV, labels_N)
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


class _WithoutIgnored(torch.autograd.Function):
    """Return the logits; in the backward pass the rows of ignored labels get a gradient of zero.

    torch multiplies the gradient of such a row by zero, which gives NaN if its logits are not
    finite.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(labels)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (labels,) = ctx.saved_tensors
        # In place: it is a new tensor from softmax or logsumexp, and as large as the logits.
        return gradients[0].masked_fill_((labels == IGNORED)[..., None], 0.0), None


def shuffle_labels(labels: np.ndarray, *, seeds: Sequence[int]) -> np.ndarray:
    """Return labels [B, T] with those of each row that count in a random order.

    Args:
        seeds: of the first rows; further rows, which fill up the batch, do not change.
    """
    shuffled = labels.copy()
    for row, seed in zip(shuffled, seeds, strict=False):
        counts = row != IGNORED
        row[counts] = np.random.default_rng(seed).permutation(row[counts])
    return shuffled


def z_penalty(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return weight * sum of log(Z)^2 over the label tokens (PaLM, section 5).

    It keeps the normaliser Z of the softmax near 1.

    Args:
        logits: [B, T, V], as for `loss_sum`.
        labels: [B, T], as for `loss_sum`.

    Returns:
        A 0-d tensor in fp32 (float64 for float64 logits), to add to the sum that is trained on.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    log_z_BT = _WithoutIgnored.apply(logits, labels).logsumexp(-1)
    return weight * torch.where(labels != IGNORED, log_z_BT.square(), 0.0).sum()
