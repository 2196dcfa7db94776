"""The decoder: causal, or with a prefix whose tokens attend to each other in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.recipe import ModelSection
from trainer.model.attention import AttentionMask
from trainer.model.block import Block
from trainer.model.layers import NORMS, Embedding, Linear, build_norm
from trainer.model.positions import (
    Alibi,
    LearnedPositions,
    RelativeBias,
    Rotary,
    SinusoidalPositions,
    build_positions,
    build_score_bias,
)

DRAWN = (Linear, Embedding, LearnedPositions, RelativeBias)
TABLES = (Rotary, SinusoidalPositions, Alibi)


def draw_weight(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    """Return initial weights: a tensor of `shape`, drawn from a normal distribution with mean 0."""
    return torch.empty(shape).normal_(std=std, generator=generator)


class Decoder(nn.Module):
    """Token ids to logits.

    The weights are a function of (section, vocabulary, seed): the same on every rank, for every
    world size and device. On the meta device no weights are drawn; call `to_empty` and
    `reset_parameters(seed)` afterwards.

    Args:
        section: architecture, sizes, dropout and constants.
        vocabulary: number of token ids, V.
        sequence_length: largest number of tokens of a sample, T.
        seed: of the initial weights; None: drawn from torch's global RNG.
    """

    def __init__(
        self,
        section: ModelSection,
        *,
        vocabulary: int,
        sequence_length: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.section = section
        self.stream_parts = 1  # ranks that split the tokens of the stream
        self.embedding = Embedding(vocabulary, section.width)
        self.embedding_norm = None
        if section.embedding_norm:
            self.embedding_norm = build_norm(section)
        self.rotary: Rotary | None = None
        if section.positions == "rope":
            self.rotary = Rotary(
                head_width=section.head_width,
                sequence_length=sequence_length,
                base=section.rope_base,
            )
        self.absolute = build_positions(section, sequence_length)
        self.blank_positions: LearnedPositions | None = None
        if section.blank_positions:
            self.blank_positions = LearnedPositions(length=sequence_length, width=section.width)
        self._build_stacks()
        self.head: Linear | None = None
        if not section.tied:
            self.head = Linear(section.width, vocabulary)
        if not self.embedding.weight.is_meta:
            self.reset_parameters(seed)

    def _build_stacks(self) -> None:
        section = self.section
        self.bias = build_score_bias(section, both=section.kind == "prefix")
        self.blocks = nn.ModuleList(Block(section) for _ in range(section.layers))
        self.norm = None  # post-norm blocks end in a norm
        if section.norm_place != "post":
            self.norm = build_norm(section)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the initial weights of GPT-2 (Radford et al. 2019, section 2.3).

        Weights are normal; projections into the residual stream are divided by the square root of
        their number; biases are 0, norms 1.
        """
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        generator = torch.Generator()  # on the CPU, for the same weights on every device
        generator.manual_seed(seed)
        std = self.section.init_std
        residual_std = std / math.sqrt(2 * self.section.layers)
        residual = self._residual_projections()
        for module in self.modules():
            if isinstance(module, NORMS):
                nn.init.ones_(module.weight)
            elif isinstance(module, TABLES):
                module.reset_parameters()
            elif isinstance(module, DRAWN):
                scale = std
                if module in residual:
                    scale = residual_std
                module.weight.copy_(draw_weight(module.weight.shape, scale, generator))
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)

    def _residual_projections(self) -> set[nn.Module]:
        found: set[nn.Module] = set()
        for block in self._all_blocks():
            found |= {block.attention.out, block.feed_forward.down}
            if block.cross is not None:
                found.add(block.cross.out)
        return found

    def _all_blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def set_recompute(self, recompute: bool) -> None:
        """Switch activation checkpointing of every block on or off."""
        for block in self._all_blocks():
            block.recompute = recompute

    @property
    def root_weight(self) -> Tensor:
        """A weight outside the blocks that every forward pass uses."""
        return (self.norm or self.head or self.embedding).weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        prefix_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
        blanks_BT: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, T, V] of the token after each of `tokens_BT`, int64 in [0, V).

        Args:
            prefix_B: number of first tokens of each row that attend to each other in both
                directions; None: all rows are causal.
            positions_BT: position of each token; None: 0, 1, 2, ...
            blanks_BT: position of each token within its blank, 0 outside; None: all 0.
        """
        x_BTD = self.embed(tokens_BT, positions_BT, blanks_BT)
        mask = self.mask(tokens_BT.shape[1], tokens_BT.device, prefix_B)
        sight = AttentionMask(mask=mask, rotary=self.rotary, positions_BT=positions_BT)
        return self.logits(self.run(self.blocks, x_BTD, sight))

    def embed(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, blanks_BT: Tensor | None = None
    ) -> Tensor:
        """Return the input of the first block, [B, T, D]."""
        x_BTD = self.embedding(tokens_BT)
        if self.absolute is not None:
            x_BTD = x_BTD + self.absolute(tokens_BT.shape[1], positions_BT)
        if self.blank_positions is not None:
            if blanks_BT is None:
                blanks_BT = torch.zeros_like(tokens_BT)
            x_BTD = x_BTD + self.blank_positions(1, blanks_BT)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = self.enter(x_BTD)
        if self.section.dropout:
            x_BTD = F.dropout(x_BTD, self.section.dropout, self.training)
        return x_BTD

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Return this rank's part of the stream; sequence parallelism replaces this method."""
        return x_BTD

    @staticmethod
    def run(blocks: Iterable[nn.Module], x_BTD: Tensor, sight: AttentionMask) -> Tensor:
        for block in blocks:
            x_BTD = block(x_BTD, sight)
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits [B, T, V] of the output of the last block."""
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.project(x_BTD)

    def project(self, x_BTD: Tensor) -> Tensor:
        """Apply the output matrix."""
        if self.head is None:
            return F.linear(x_BTD, self.embedding.weight)
        return cast(Tensor, self.head(x_BTD))

    def mask(
        self, length: int, device: torch.device, prefix_B: Tensor | None = None
    ) -> Tensor | None:
        """Return what is added to the scores of `length` tokens, [1 or B, 1 or H, T, T].

        None for causal rows without a bias.
        """
        if self.bias is None and prefix_B is None:
            return None
        at = torch.arange(length, device=device)
        seen = (at <= at[:, None])[None, None]
        if prefix_B is not None:
            seen = seen | (at < prefix_B[:, None, None, None])
        bias = torch.zeros((), device=at.device)
        if self.bias is not None:
            bias = self.bias(length)[None]
        return torch.where(seen, bias, -torch.inf)
