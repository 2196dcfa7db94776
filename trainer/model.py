"""The causal decoder: RMSNorm before each block, rotary positions, SwiGLU, tied or untied embeddings.

Shape suffixes: B batch, T tokens of a sample, D model width, H heads, K width of a head, F width of the SwiGLU
block, V vocabulary.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config import ModelSection
from trainer.sizes import hidden_width


class Linear(nn.Linear):
    """Without a bias; the decoder draws all weights at once, so torch's own draw would only move the global dice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, equation 34): pair i of position t turns by t * base^(-2i / K).

    Neighbouring numbers are a pair, so a turn is one complex product. Angles stay in fp32 whatever the precision
    of the model: position 1000 is not a number in bf16.
    """

    turns_TK: Tensor

    def __init__(self, *, head_width: int, sequence_length: int, base: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.base = base
        # (cos, sin) side by side: T x K/2 x 2 real numbers, because safetensors and bf16 casts know no complex ones.
        self.register_buffer("turns_TK", torch.empty(sequence_length, head_width // 2, 2), persistent=False)

    def reset_parameters(self) -> None:
        # In float64 on the CPU: the same bits on every device.
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width
        angles = torch.arange(len(self.turns_TK), dtype=torch.float64)[:, None] * self.base**-exponents
        self.turns_TK.copy_(torch.stack([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Turn `x`, shaped [B, T, H, K], by its positions; dtype kept."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
        turns = torch.view_as_complex(self.turns_TK[: x.shape[1]].to(dtype))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.heads = section.heads
        self.dropout = section.dropout
        self.qkv = Linear(section.width, 3 * section.width)
        self.out = Linear(section.width, section.width)

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_BHTK, k_BHTK, v_BHTK = (y.transpose(1, 2) for y in (rotary(q_BTHK), rotary(k_BTHK), v_BTHK))
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, dropout_p=dropout)
        return cast(Tensor, self.out(y_BHTK.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x); gate and up are one matrix."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        hidden = hidden_width(section)
        self.gate_up = Linear(section.width, 2 * hidden)
        self.down = Linear(hidden, section.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate_BTF) * up_BTF))


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to the residual stream.

    `recompute` drops the activations after the forward pass and makes them again in the backward pass. It stands
    inside the block, so that names of parameters stay and fsdp gathers a block's weights around both passes.
    """

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.dropout = section.dropout
        self.recompute = False
        self.attention_norm = nn.RMSNorm(section.width, eps=section.norm_eps)
        self.attention = Attention(section)
        self.feed_forward_norm = nn.RMSNorm(section.width, eps=section.norm_eps)
        self.feed_forward = FeedForward(section)

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            dice = self.training and self.dropout > 0  # saving their state costs, and without dropout none are thrown
            return cast(Tensor, checkpoint(self._forward, x_BTD, rotary, use_reentrant=False, preserve_rng_state=dice))
        return self._forward(x_BTD, rotary)

    def _forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), rotary))
        return x_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class Decoder(nn.Module):
    """Token ids to logits.

    The weights are a function of (section, vocabulary, seed): the same on every rank, for every world size and
    device. On the meta device nothing is drawn; `to_empty` and `reset_parameters(seed)` finish such a model.

    Args:
        section: sizes, dropout and constants.
        vocabulary: number of token ids, V.
        sequence_length: most tokens of a sample, T.
        seed: of the initial weights; None draws it from torch's global generator.
    """

    def __init__(
        self, section: ModelSection, *, vocabulary: int, sequence_length: int, seed: int | None = None
    ) -> None:
        super().__init__()
        self.section = section
        self.embedding = Embedding(vocabulary, section.width)
        self.rotary = Rotary(
            head_width=section.width // section.heads, sequence_length=sequence_length, base=section.rope_base
        )
        self.blocks = nn.ModuleList(Block(section) for _ in range(section.layers))
        self.norm = nn.RMSNorm(section.width, eps=section.norm_eps)
        self.head = None if section.tied else Linear(section.width, vocabulary)
        if not self.embedding.weight.is_meta:
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """GPT-2's initial weights (Radford et al. 2019, section 2.3): normal, projections into the residual stream
        scaled down by the square root of their number."""
        generator = torch.Generator()  # on the CPU, for the same weights on every device
        generator.manual_seed(int(torch.randint(1 << 62, ())) if seed is None else seed)
        std, residual_std = self.section.init_std, self.section.init_std / math.sqrt(2 * self.section.layers)
        residual = self._residual_projections()
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Rotary):
                module.reset_parameters()
            elif isinstance(module, (Linear, Embedding)):
                scale = residual_std if module in residual else std
                weight = torch.empty(module.weight.shape).normal_(std=scale, generator=generator)
                module.weight.copy_(weight)

    def _residual_projections(self) -> set[nn.Module]:
        blocks = cast("list[Block]", list(self.blocks))
        return {block.attention.out for block in blocks} | {block.feed_forward.down for block in blocks}

    def set_recompute(self, recompute: bool) -> None:
        """Activation checkpointing of every block, on or off."""
        for block in cast("list[Block]", list(self.blocks)):
            block.recompute = recompute

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token that follows each of `tokens_BT`, int64 in [0, V)."""
        x_BTD = self.embedding(tokens_BT)
        if self.section.dropout:
            x_BTD = F.dropout(x_BTD, self.section.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.rotary)
        x_BTD = self.norm(x_BTD)
        return F.linear(x_BTD, self.embedding.weight) if self.head is None else cast(Tensor, self.head(x_BTD))
