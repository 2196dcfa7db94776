"""A block: attention and feed-forward with their norms, added to the residual stream."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config.recipe import ModelSection
from trainer.model.attention import Attention, AttentionMask, CrossAttention
from trainer.model.feed_forward import build_feed_forward
from trainer.model.layers import build_norm


def _norm_if(condition: bool, section: ModelSection) -> nn.Module | None:
    if not condition:
        return None
    return build_norm(section)


class Block(nn.Module):
    """Attention, with `cross` attention to an encoder, and feed-forward.

    Place of the norms (y: sublayer, x: stream):
        pre       x + y(norm(x))            Xiong et al. 2020; with RMSNorm LLaMA
        post      norm(x + y(x))            Vaswani et al. 2017
        sandwich  x + norm(y(norm(x)))      CogView, Ding et al. 2021
        parallel  x + attention(norm(x)) + feed_forward(norm(x)) with one norm; PaLM

    With `recompute`, activations are dropped after the forward pass and computed again in the
    backward pass. It is inside the block, so that names of parameters do not change and fsdp
    gathers a block's weights for both passes.
    """

    def __init__(self, section: ModelSection, *, cross: bool = False) -> None:
        super().__init__()
        self.dropout = section.dropout
        self.recompute = False
        self.parallel = section.parallel
        self.post = section.norm_place == "post"
        sandwich = section.norm_place == "sandwich"
        self.attention_norm = build_norm(section)
        self.attention = Attention(section)
        self.attention_after = _norm_if(sandwich, section)
        self.cross_norm = _norm_if(cross, section)
        self.cross: CrossAttention | None = None
        if cross:
            self.cross = CrossAttention(section)
        self.cross_after = _norm_if(cross and sandwich, section)
        self.feed_forward_norm = _norm_if(not section.parallel, section)
        self.feed_forward = build_feed_forward(section)
        self.feed_forward_after = _norm_if(sandwich, section)

    def forward(self, x_BTD: Tensor, sight: AttentionMask) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # Saving the RNG state takes time; without dropout no random number is drawn.
            uses_rng = self.training and self.dropout > 0
            output = checkpoint(
                self._forward, x_BTD, sight, use_reentrant=False, preserve_rng_state=uses_rng
            )
            return cast(Tensor, output)
        return self._forward(x_BTD, sight)

    def _forward(self, x_BTD: Tensor, sight: AttentionMask) -> Tensor:
        if self.feed_forward_norm is None:
            normed_BTD = self.attention_norm(x_BTD)
            attended_BTD = self._drop(self.attention(normed_BTD, sight))
            return x_BTD + attended_BTD + self._drop(self.feed_forward(normed_BTD))
        x_BTD = self._add(x_BTD, self.attention, self.attention_norm, self.attention_after, sight)
        if self.cross is not None and self.cross_norm is not None:
            x_BTD = self._add(x_BTD, self.cross, self.cross_norm, self.cross_after, sight)
        return self._add(x_BTD, self.feed_forward, self.feed_forward_norm, self.feed_forward_after)

    def _add(
        self,
        x_BTD: Tensor,
        sublayer: nn.Module,
        norm: nn.Module,
        after: nn.Module | None,
        *sight: AttentionMask,
    ) -> Tensor:
        if self.post:
            return cast(Tensor, norm(x_BTD + self._drop(sublayer(x_BTD, *sight))))
        y_BTD = sublayer(norm(x_BTD), *sight)
        if after is not None:
            y_BTD = after(y_BTD)
        return x_BTD + self._drop(y_BTD)

    def _drop(self, x_BTD: Tensor) -> Tensor:
        if not self.dropout:
            return x_BTD
        return F.dropout(x_BTD, self.dropout, self.training)
