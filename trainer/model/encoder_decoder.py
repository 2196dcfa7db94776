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
    """A decoder that also attends to what an encoder made of a source row. Same arguments as
    `Decoder`.

    `blocks` holds the encoder's blocks first, then the decoder's, so that whatever treats a model
    block by block (sharding, recomputation) finds all of them.
    """

    def _build_stacks(self) -> None:
        section = self.section
        self.encoder_layers = section.encoder_layers or section.layers
        self.encoder_bias = build_score_bias(section, both=True)
        self.bias = build_score_bias(section, both=False)
        encoder = [Block(section) for _ in range(self.encoder_layers)]
        decoder = [Block(section, cross=True) for _ in range(section.layers)]
        self.blocks = nn.ModuleList(encoder + decoder)
        post = section.norm_place == "post"
        self.encoder_norm = None if post else build_norm(section)
        self.norm = None if post else build_norm(section)

    def forward(  # type: ignore[override]  # a prefix is the encoder's business here
        self, tokens_BT: Tensor, *, source_BS: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of the token that follows each of `tokens_BT`, int64 in [0, V).

        Args:
            source_BS: what the encoder reads; None: the same tokens.
        """
        memory_BSD = self.encode(tokens_BT if source_BS is None else source_BS)
        mask = self.mask(tokens_BT.shape[1], tokens_BT.device)
        sight = AttentionMask(mask=mask, rotary=self.rotary, memory_BSD=memory_BSD)
        return self.logits(
            self.run(self.blocks[self.encoder_layers :], self.embed(tokens_BT), sight)
        )

    def encode(self, source_BS: Tensor) -> Tensor:
        """[B, S, D]: each token of the source knows all the others."""
        bias = None if self.encoder_bias is None else self.encoder_bias(source_BS.shape[1])[None]
        sight = AttentionMask(causal=False, mask=bias, rotary=self.rotary)
        x_BSD = self.run(self.blocks[: self.encoder_layers], self.embed(source_BS), sight)
        return x_BSD if self.encoder_norm is None else cast(Tensor, self.encoder_norm(x_BSD))
