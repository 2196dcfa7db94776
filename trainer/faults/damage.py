"""What staged faults do to data, weights, moments and gradients. When they strike is said in
trainer.faults.fault_injection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from guardrail.torch.measure.gradient_norms import to_local
from trainer.data.loader import MicroBatch
from trainer.objectives.loss import IGNORED

NGRAM = 3
# Integers as wide as a float, to flip its bits in.
AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def damage_rows(
    micro: MicroBatch, kind: str, rows: Sequence[tuple[int, int]], *, vocabulary: int
) -> MicroBatch:
    """A micro-batch with other text in some rows; what was ignored stays ignored.

    The dice of a row come from its position alone, so that the same sample is spoiled alike
    whenever it is formed.

    Args:
        kind: noise_tokens: ids of the upper half of the vocabulary, without meaning, as of text
            that was decoded wrongly; repeat_tokens: three ids again and again; shuffle_labels: the
            labels of the row in another order.
        rows: (row, position).
    """
    tokens, labels = micro.tokens.copy(), micro.labels.copy()
    length = tokens.shape[1]
    for row, position in rows:
        dice = np.random.default_rng(position)
        if kind == "shuffle_labels":
            told = labels[row] != IGNORED
            labels[row, told] = dice.permutation(labels[row, told])
            continue
        if kind == "noise_tokens":
            text = dice.integers(vocabulary // 2, vocabulary, size=length + 1)
        else:
            ngram = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, size=NGRAM)
            text = np.resize(ngram, length + 1)
        tokens[row] = text[:-1]
        labels[row] = np.where(labels[row] == IGNORED, IGNORED, text[1:])
    return replace(micro, tokens=tokens, labels=labels)


@torch.no_grad()
def damage_state(
    kind: str, model: nn.Module, optimizers: Sequence[Optimizer], *, value: float, entry: int
) -> None:
    """Change weights or moments in place, as broken memory or a broken program would between two
    steps.

    On a sharded model each rank changes its own part: `entry` counts within it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [
        p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2
    ] or parameters
    if kind == "scale_weights":
        for parameter in parameters:
            to_local(parameter).mul_(value)
    elif kind == "scale_row":
        rows = to_local(
            next(p for name, p in model.named_parameters() if "embedding" in name and p.ndim == 2)
        )
        if len(rows):
            rows[entry % len(rows)] *= value
    elif kind == "flip_weight":
        flip_bit(to_local(matrices[0]), entry=entry, bit=int(value))
    else:
        for moments in (optimizer.state.get(p, {}) for p in matrices for optimizer in optimizers):
            if kind == "flip_moment" and "exp_avg" in moments:
                flip_bit(to_local(moments["exp_avg"]), entry=entry, bit=int(value))
                return
        if kind == "zero_moments":
            for optimizer in optimizers:
                for held in optimizer.state.values():
                    for name, tensor in held.items():
                        if name != "step" and isinstance(tensor, Tensor):
                            to_local(tensor).zero_()


def flip_bit(tensor: Tensor, *, entry: int, bit: int) -> None:
    """Flip bit `bit` (0: the lowest of the mantissa; of float32 30: the highest of the exponent) of
    one entry.
    """
    bits = tensor.view(AS_INTEGERS[tensor.dtype]).view(-1)
    if len(bits):  # a rank may hold nothing of a small sharded parameter
        mask = 1 << bit if bit < 8 * bits.element_size() - 1 else -(1 << bit)
        bits[entry % len(bits)] ^= mask


def noise_gradient(gradient: Tensor, *, value: float) -> Tensor:
    """Noise with `value` times the norm of the gradient it replaces: other noise each time, as of
    broken hardware.
    """
    noise = torch.from_numpy(np.random.default_rng().standard_normal(tuple(gradient.shape))).to(
        gradient
    )
    return noise * (value * gradient.norm() / noise.norm())
