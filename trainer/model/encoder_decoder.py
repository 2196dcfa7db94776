"""Encoder and decoder (Vaswani et al. 2017; T5): one embedding, two stacks."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from trainer.model.attention import AttentionMask
from trainer.model.block import Block
from trainer.model.decoder import Decoder
from trainer.model.layers import build_norm
from trainer.model.positions import build_score_bias


class EncoderDecoder(Decoder):
    """A decoder that also attends to the output of an encoder. Same arguments as `Decoder`.

    `blocks` holds the encoder's blocks, then the decoder's. Sharding and recomputation, which work
    block by block, therefore find all of them.
    """

    def _build_stacks(self) -> None:
        section = self.section
        self.encoder_layers = section.encoder_layers or section.layers
        self.encoder_bias = build_score_bias(section, both=True)
        self.bias = build_score_bias(section, both=False)
        encoder = [Block(section) for _ in range(self.encoder_layers)]
        decoder = [Block(section, cross=True) for _ in range(section.layers)]
        self.blocks = nn.ModuleList(encoder + decoder)
        self.encoder_norm = self.norm = None
        if section.norm_place != "post":
            self.encoder_norm = build_norm(section)
            self.norm = build_norm(section)

    def forward(  # type: ignore[override]  # the encoder reads the prefix here
        self, tokens_BT: Tensor, *, source_BS: Tensor | None = None
    ) -> Tensor:
        """Return logits [B, T, V] of the token after each of `tokens_BT`, int64 in [0, V).

        Args:
            source_BS: the encoder's input; None: the same tokens.
        """
        if source_BS is None:
            source_BS = tokens_BT
        memory_BSD = self.encode(source_BS)
        mask = self.mask(tokens_BT.shape[1], tokens_BT.device)
        sight = AttentionMask(mask=mask, rotary=self.rotary, memory_BSD=memory_BSD)
        return self.logits(
            self.run(self.blocks[self.encoder_layers :], self.embed(tokens_BT), sight)
        )

    def encode(self, source_BS: Tensor) -> Tensor:
        """Return the encoder's output [B, S, D]; each token attends to all others."""
        bias = None
        if self.encoder_bias is not None:
            bias = self.encoder_bias(source_BS.shape[1])[None]
        sight = AttentionMask(causal=False, mask=bias, rotary=self.rotary)
        x_BSD = self.run(self.blocks[: self.encoder_layers], self.embed(source_BS), sight)
        if self.encoder_norm is None:
            return x_BSD
        return cast(Tensor, self.encoder_norm(x_BSD))
