"""What injected faults do to data, weights, moments and gradients.

trainer.faults.fault_injection decides when.
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

NGRAM = 3  # tokens that repeat_tokens repeats
# Float type -> integers of the same width, to flip its bits in.
AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def damage_rows(
    micro: MicroBatch, kind: str, rows: Sequence[tuple[int, int]], *, vocabulary: int
) -> MicroBatch:
    """Return a micro-batch with other text in some rows; ignored labels stay ignored.

    The random numbers of a row depend on its position alone. A sample is therefore damaged in the
    same way each time.

    Args:
        kind: noise_tokens: random ids of the upper half of the vocabulary, as of text that was
            decoded wrongly. repeat_tokens: three ids, repeated. shuffle_labels: the labels of the
            row in another order.
        rows: (row, position) of the rows to change.
    """
    tokens, labels = micro.tokens.copy(), micro.labels.copy()
    length = tokens.shape[1]
    for row, position in rows:
        random = np.random.default_rng(position)
        if kind == "shuffle_labels":
            counts = labels[row] != IGNORED
            labels[row, counts] = random.permutation(labels[row, counts])
            continue
        if kind == "noise_tokens":
            text = random.integers(vocabulary // 2, vocabulary, size=length + 1)
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
    """Change weights or moments in place, as broken memory or a broken program would.

    On a sharded model each rank changes its own part, and `entry` counts within it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "blocks." in name and p.ndim == 2] or parameters
    if kind == "scale_weights":
        for parameter in parameters:
            to_local(parameter).mul_(value)
    elif kind == "scale_row":
        embedding = next(p for name, p in named if "embedding" in name and p.ndim == 2)
        rows = to_local(embedding)
        if len(rows):
            rows[entry % len(rows)] *= value
    elif kind == "flip_weight":
        flip_bit(to_local(matrices[0]), entry=entry, bit=int(value))
    elif kind == "flip_moment":
        moment = _first_moment(matrices, optimizers)
        if moment is not None:
            flip_bit(moment, entry=entry, bit=int(value))
    elif kind == "zero_moments":
        _zero_moments(optimizers)


def _first_moment(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]
) -> Tensor | None:
    """Return this rank's part of the first moment of the first parameter that has one."""
    for parameter in parameters:
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                return to_local(state["exp_avg"])
    return None


def _zero_moments(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for name, tensor in state.items():
                if name != "step" and isinstance(tensor, Tensor):
                    to_local(tensor).zero_()


def flip_bit(tensor: Tensor, *, entry: int, bit: int) -> None:
    """Flip one bit of one entry.

    Args:
        bit: 0 is the lowest of the mantissa; of a float32, 30 is the highest of the exponent.
    """
    bits = tensor.view(AS_INTEGERS[tensor.dtype]).view(-1)
    if not len(bits):  # a rank may hold nothing of a small sharded parameter
        return
    mask = 1 << bit
    if bit >= 8 * bits.element_size() - 1:  # the sign bit
        mask = -mask
    bits[entry % len(bits)] ^= mask


def noise_gradient(gradient: Tensor, *, value: float) -> Tensor:
    """Return noise with `value` times the norm of a gradient, new noise each time."""
    values = np.random.default_rng().standard_normal(tuple(gradient.shape))
    noise = torch.from_numpy(values).to(gradient)
    return noise * (value * gradient.norm() / noise.norm())
