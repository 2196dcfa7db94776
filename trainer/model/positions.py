"""Positions: rotated queries and keys, tables added to the embedding, biases of scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.config.recipe import ModelSection


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, equation 34).

    Pair i at position t is rotated by the angle t * base^(-2i / K). Neighbouring numbers are a pair,
    so a rotation is one complex product. Angles are fp32 for every precision of the model: bf16
    cannot represent position 1000 exactly.
    """

    turns_TK: Tensor

    def __init__(self, *, head_width: int, sequence_length: int, base: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.base = base
        # (cos, sin) as T x K/2 x 2 real numbers: safetensors and bf16 casts have no complex ones.
        self.register_buffer(
            "turns_TK", torch.empty(sequence_length, head_width // 2, 2), persistent=False
        )

    def reset_parameters(self) -> None:
        # Computed in float64 on the CPU, for the same bits on every device.
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width
        angles = (
            torch.arange(len(self.turns_TK), dtype=torch.float64)[:, None] * self.base**-exponents
        )
        self.turns_TK.copy_(torch.stack([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Return `x`, [B, T, H, K], rotated by its positions, in the same dtype.

        Args:
            positions_BT: int64; None: 0, 1, 2, ...
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
        if positions_BT is None:
            table = self.turns_TK[: x.shape[1]]
        else:
            table = self.turns_TK[positions_BT]
        turns = torch.view_as_complex(table.to(dtype))
        return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).type_as(x)


class LearnedPositions(nn.Module):
    """A learned table of vectors [length, D] that is added to the embedding (GPT-2)."""

    def __init__(self, *, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, length: int, positions_BT: Tensor | None = None) -> Tensor:
        """Return [T, D], or [B, T, D] for given positions."""
        if positions_BT is None:
            return self.weight[:length]
        return self.weight[positions_BT]


class SinusoidalPositions(nn.Module):
    """sin(t / 10000^(2i / D)) and cos of the same, alternating (Vaswani et al. 2017, section 3.5)."""

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
        """Return [T, D], or [B, T, D] for given positions."""
        if positions_BT is None:
            return self.table_TD[:length]
        return self.table_TD[positions_BT]


class Alibi(nn.Module):
    """Attention with linear biases (Press et al. 2022): each head subtracts slope * distance.

    If H is a power of two, the slopes are 2^(-8/H), 2^(-16/H), ... For other H they are those of
    the next lower power, and every second one of the next higher power, as in the authors' code and
    in BLOOM.
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
        """Return the bias [H, T, T]: -slope * |distance|."""
        at = torch.arange(length, device=self.slopes_H.device)
        distance_TT = (at[:, None] - at).abs()
        return -self.slopes_H[:, None, None] * distance_TT


class RelativeBias(nn.Module):
    """T5's learned bias of scores by distance (Raffel et al. 2020, section 2.1).

    One table serves a stack of blocks. Half of the buckets hold one distance each, the other half
    grow logarithmically up to `distance`. With `both`, half of the buckets are for earlier tokens
    and half for later ones.
    """

    def __init__(self, *, heads: int, buckets: int, distance: int, both: bool) -> None:
        super().__init__()
        self.buckets, self.distance, self.both = buckets, distance, both
        self.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, length: int) -> Tensor:
        """Return the bias [H, T, T] of the scores."""
        at = torch.arange(length, device=self.weight.device)
        return self.weight[self.bucket(at - at[:, None])].permute(2, 0, 1)

    def bucket(self, offset: Tensor) -> Tensor:
        """Return the bucket of each offset (key position - query position)."""
        buckets, base, distance = self.buckets, torch.zeros_like(offset), (-offset).clamp(min=0)
        if self.both:
            buckets = self.buckets // 2
            base = (offset > 0) * buckets
            distance = offset.abs()
        exact = buckets // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return base + torch.where(distance < exact, distance, far)


def build_positions(
    section: ModelSection, length: int
) -> LearnedPositions | SinusoidalPositions | None:
    """Return the table that is added to the embedding; None without one."""
    if section.positions == "learned":
        return LearnedPositions(length=length, width=section.width)
    if section.positions == "sinusoidal":
        return SinusoidalPositions(length=length, width=section.width)
    return None


def build_score_bias(section: ModelSection, *, both: bool) -> Alibi | RelativeBias | None:
    """Return the bias of attention scores; None without one.

    Args:
        both: whether tokens attend to later ones too.
    """
    if section.positions == "alibi":
        return Alibi(heads=section.heads)
    if section.positions == "t5":
        return RelativeBias(
            heads=section.heads, buckets=section.t5_buckets, distance=section.t5_distance, both=both
        )
    return None
