"""The training objective and the arithmetic that makes accumulation exact.

The loss of a batch is the mean over its label tokens, wherever they lie. A rank backpropagates each
micro-batch's *sum* times world / nominal, where nominal is a constant: the tokens of a full global
batch. The mean that ddp and fsdp take over the ranks turns that into the global sum over nominal,
and once the step's one all-reduce has told how many label tokens there were, the guard multiplies
the gradients by nominal / tokens, together with the clip coefficient. So the update is the same
however the batch is cut into ranks and micro-batches, short or half-ignored ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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
        A 0-d tensor in fp32 (float64 for float64 logits) and a 0-d int64 tensor, both on the device
        of the logits: nothing here waits for it. With every label ignored the sum is 0.0 and so are
        its gradients (not 0/0).
    """
    logits_NV = logits.flatten(0, -2)
    if logits_NV.dtype not in (torch.float32, torch.float64):
        logits_NV = logits_NV.float()
    labels_N = labels.flatten()
    logits_NV = _WithoutIgnored.apply(logits_NV, labels_N)
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


class _WithoutIgnored(torch.autograd.Function):
    """The logits as they are; on the way back the rows of ignored labels get a gradient of zero.

    torch multiplies the gradient of such a row by zero. Where its logits are not finite that is
    NaN, and not zero.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(labels)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (labels,) = ctx.saved_tensors
        # In place: softmax and logsumexp have just made it, and it is as large as the logits.
        return gradients[0].masked_fill_((labels == IGNORED)[..., None], 0.0), None


def shuffle_labels(labels: np.ndarray, *, seeds: Sequence[int]) -> np.ndarray:
    """Labels [B, T] with those that count in another random order within each row, the same for the
    same seed.

    Args:
        seeds: of the first rows; further ones, which only fill up, stay as they are.
    """
    found = labels.copy()
    for row, seed in zip(found, seeds, strict=False):
        counts = row != IGNORED
        row[counts] = np.random.default_rng(seed).permutation(row[counts])
    return found


def z_penalty(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """weight * sum of log(Z)^2 over the label tokens, which keeps the softmax's normaliser near 1
    (PaLM, section 5).

    Args:
        logits: [B, T, V]; labels: [B, T], as for `loss_sum`.

    Returns:
        A 0-d tensor in fp32 (float64 for float64 logits), to be added to the sum that is trained
        on.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    log_z_BT = _WithoutIgnored.apply(logits, labels).logsumexp(-1)
    return weight * torch.where(labels != IGNORED, log_z_BT.square(), 0.0).sum()
