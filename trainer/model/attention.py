"""Attention of a row to itself and to the encoder's output; heads of keys and values may be shared."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.recipe import ModelSection
from trainer.model.layers import Linear, build_norm
from trainer.model.positions import Rotary


class AttentionMask(NamedTuple):
    """Which tokens attend to which in a forward pass; the same for all blocks of a stack.

    Attributes:
        causal: whether a token attends to itself and earlier ones only; used without a mask.
        mask: added to the scores, broadcast to [B, H, T, T]: position biases, -inf where a token
            does not attend.
        rotary: rotates queries and keys. A module, not a table, so that mixed precision does not
            round its angles.
        positions_BT: for `rotary`; None: 0, 1, 2, ...
        memory_BSD: output of the encoder.
    """

    causal: bool = True
    mask: Tensor | None = None
    rotary: Rotary | None = None
    positions_BT: Tensor | None = None
    memory_BSD: Tensor | None = None


class Attention(nn.Module):
    """Self-attention. Queries, keys and values have separate matrices, so each is split by heads.

    That costs nothing on a CPU. A step takes 0.95 to 1.00 times as long as with one matrix for all
    three and one for gate and up (0.9, 10 and 29 M parameters, medians of 16 pairs).
    """

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.heads, self.groups, self.head_width = section.heads, section.groups, section.head_width
        self.dropout = section.dropout
        # Largest score of each head since it was last set to 0, for QK-clip; None: not recorded.
        self.peaks_H: Tensor | None = None
        self.q = Linear(section.width, section.heads * section.head_width, bias=section.bias)
        self.k = Linear(section.width, section.groups * section.head_width, bias=section.bias)
        self.v = Linear(section.width, section.groups * section.head_width, bias=section.bias)
        self.query_norm = self.key_norm = None
        if section.qk_norm:
            self.query_norm = build_norm(section, section.head_width)
            self.key_norm = build_norm(section, section.head_width)
        self.out = Linear(section.width, section.width, bias=section.bias)

    def _heads(self, x_BTD: Tensor, sight: AttentionMask) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, H, K], keys and values [B, T, G, K], normed and rotated.

        With tensor parallelism these are the heads of this rank.
        """
        q_BTHK, k_BTGK, v_BTGK = (
            project(x_BTD).unflatten(-1, (-1, self.head_width))
            for project in (self.q, self.k, self.v)
        )
        q_BTHK, k_BTGK = self._normed(q_BTHK, k_BTGK)
        if sight.rotary is not None:
            q_BTHK, k_BTGK = (sight.rotary(y, sight.positions_BT) for y in (q_BTHK, k_BTGK))
        return q_BTHK, k_BTGK, v_BTGK

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.query_norm is None or self.key_norm is None:
            return q, k
        return self.query_norm(q).type_as(q), self.key_norm(k).type_as(k)

    def forward(self, x_BTD: Tensor, sight: AttentionMask) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self._heads(x_BTD, sight))
        return self._attend(q, k, v, causal=sight.causal, mask=sight.mask)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None
    ) -> Tensor:
        """Return the attention output: [B, H, T, K] x [B, G, S, K] -> [B, T, D]."""
        if self.peaks_H is not None and self.training:
            self._record_scores(q.detach(), k.detach(), causal=causal, mask=mask)
        options: dict[str, Any] = {}
        if self.heads != self.groups:
            options = {"enable_gqa": True}
        dropout = 0.0
        if self.training:
            dropout = self.dropout
        if mask is None:
            y_BHTK = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, dropout_p=dropout, **options
            )
        else:
            y_BHTK = F.scaled_dot_product_attention(
                q, k, v, mask.to(q.dtype), dropout_p=dropout, **options
            )
        return cast(Tensor, self.out(y_BHTK.transpose(1, 2).flatten(-2)))

    @torch.no_grad()
    def _record_scores(self, q: Tensor, k: Tensor, *, causal: bool, mask: Tensor | None) -> None:
        """Record the largest score of each head, without position biases.

        It computes all scores, which attention itself does not.
        """
        assert self.peaks_H is not None
        k = k.repeat_interleave(self.heads // self.groups, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() / self.head_width**0.5
        if mask is not None:
            scores = scores.masked_fill(mask == -torch.inf, -torch.inf)
        elif causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
        torch.maximum(self.peaks_H, scores.amax((0, 2, 3)), out=self.peaks_H)

    def query_key_rows(self, *, keys: bool) -> list[tuple[Tensor, int]]:
        """Return (weight or bias of the queries, its first row for them); with `keys` also of the keys."""
        linears = [self.q]
        if keys:
            linears.append(self.k)
        return [(p, 0) for linear in linears for p in (linear.weight, linear.bias) if p is not None]


class CrossAttention(Attention):
    """Attention of the decoder to the encoder's output, without positions (Raffel et al. 2020)."""

    def forward(self, x_BTD: Tensor, sight: AttentionMask) -> Tensor:
        memory_BSD = sight.memory_BSD
        assert memory_BSD is not None
        q_BTHK = self.q(x_BTD).unflatten(-1, (-1, self.head_width))
        k_BSGK, v_BSGK = (
            project(memory_BSD).unflatten(-1, (-1, self.head_width)) for project in (self.k, self.v)
        )
        q_BTHK, k_BSGK = self._normed(q_BTHK, k_BSGK)
        q, k, v = (y.transpose(1, 2) for y in (q_BTHK, k_BSGK, v_BSGK))
        return self._attend(q, k, v, causal=False, mask=None)
