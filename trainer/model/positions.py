"""How a model knows where a token stands: turned queries and keys, tables added to the embedding,
biases of scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.config.recipe import ModelSection


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, equation 34): pair i of position t turns by t *
    base^(-2i / K).

    Neighbouring numbers are a pair, so a turn is one complex product. Angles stay in fp32 whatever
    the precision of the model: position 1000 is not a number in bf16.
    """

    turns_TK: Tensor

    def __init__(self, *, head_width: int, sequence_length: int, base: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.base = base
        # (cos, sin) side by side: T x K/2 x 2 real numbers, because safetensors and bf16 casts know
        # no complex ones.
        self.register_buffer(
            "turns_TK", torch.empty(sequence_length, head_width // 2, 2), persistent=False
        )

    def reset_parameters(self) -> None:
        # In float64 on the CPU: the same bits on every device.
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width
        angles = (
            torch.arange(len(self.turns_TK), dtype=torch.float64)[:, None] * self.base**-exponents
        )
        self.turns_TK.copy_(torch.stack([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Turn `x`, shaped [B, T, H, K], by its positions; dtype kept.

        Args:
            positions_BT: int64 positions; None: 0, 1, 2, ...
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
        table = self.turns_TK[: x.shape[1]] if positions_BT is None else self.turns_TK[positions_BT]
        turns = torch.view_as_complex(table.to(dtype))
        return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).type_as(x)


class LearnedPositions(nn.Module):
    """A table of vectors [length, D] to be added to the embedding (GPT-2)."""

    def __init__(self, *, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, length: int, positions_BT: Tensor | None = None) -> Tensor:
        """[T, D], or [B, T, D] of given positions."""
        return self.weight[:length] if positions_BT is None else self.weight[positions_BT]


class SinusoidalPositions(nn.Module):
    """Vaswani et al. 2017, section 3.5: sin(t / 10000^(2i / D)) and cos of the same in turn."""

    table_TD: Tensor

    def __init__(self, *, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table_TD", torch.empty(length, width), persistent=False)

    def reset_parameters(self) -> None:
        length, width = self.table_TD.shape
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0**-exponents
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        self.table_TD.copy_(table[:, :width])

    def forward(self, length: int, positions_BT: Tensor | None = None) -> Tensor:
        """[T, D], or [B, T, D] of given positions."""
        return self.table_TD[:length] if positions_BT is None else self.table_TD[positions_BT]


class Alibi(nn.Module):
    """Attention with linear biases (Press et al. 2022): each head takes slope * distance off its
    scores.

    The slopes are 2^(-8/H), 2^(-16/H), ... for H a power of two; for other H those of the power
    below, and every second one of the power above, as in the authors' code and in BLOOM.
    """

    slopes_H: Tensor

    def __init__(self, *, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes_H", torch.empty(heads), persistent=False)

    def reset_parameters(self) -> None:
        heads = len(self.slopes_H)
        below = 1 << (heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
        slopes += [2.0 ** (-4.0 * (i + 1) / below) for i in range(0, 2 * (heads - below), 2)]
        self.slopes_H.copy_(torch.tensor(slopes, dtype=torch.float64))

    def forward(self, length: int) -> Tensor:
        """[H, T, T]: -slope * |distance|."""
        at = torch.arange(length, device=self.slopes_H.device)
        distance_TT = (at[:, None] - at).abs()
        return -self.slopes_H[:, None, None] * distance_TT


class RelativeBias(nn.Module):
    """T5's learned bias of scores by distance (Raffel et al. 2020, section 2.1), one table for a
    stack of blocks.

    Half of the buckets are single distances, the other half grow logarithmically up to `distance`.
    With `both` the buckets are shared out between tokens before and tokens behind.
    """

    def __init__(self, *, heads: int, buckets: int, distance: int, both: bool) -> None:
        super().__init__()
        self.buckets, self.distance, self.both = buckets, distance, both
        self.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, length: int) -> Tensor:
        """[H, T, T], to be added to the scores."""
        at = torch.arange(length, device=self.weight.device)
        return self.weight[self.bucket(at - at[:, None])].permute(2, 0, 1)

    def bucket(self, offset: Tensor) -> Tensor:
        """Key position - query position -> number of the bucket."""
        buckets = self.buckets // 2 if self.both else self.buckets
        base = (offset > 0) * buckets if self.both else torch.zeros_like(offset)
        distance = offset.abs() if self.both else (-offset).clamp(min=0)
        exact = buckets // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return base + torch.where(distance < exact, distance, far)


def build_positions(
    section: ModelSection, length: int
) -> LearnedPositions | SinusoidalPositions | None:
    """The table that is added to the embedding, if there is one."""
    if section.positions == "learned":
        return LearnedPositions(length=length, width=section.width)
    if section.positions == "sinusoidal":
        return SinusoidalPositions(length=length, width=section.width)
    return None


def build_score_bias(section: ModelSection, *, both: bool) -> Alibi | RelativeBias | None:
    """The bias of attention scores, if there is one; `both`: tokens see those behind them as
    well.
    """
    if section.positions == "alibi":
        return Alibi(heads=section.heads)
    if section.positions == "t5":
        return RelativeBias(
            heads=section.heads, buckets=section.t5_buckets, distance=section.t5_distance, both=both
        )
    return None
