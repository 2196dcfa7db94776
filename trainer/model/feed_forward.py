"""The feed-forward block, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.recipe import GATED, ModelSection
from trainer.config.sizes import hidden_width
from trainer.model.layers import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GatedFeedForward(nn.Module):
    """SwiGLU and GEGLU (Shazeer 2020): down(act(gate x) * up x)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        hidden = hidden_width(section)
        self.activation = ACTIVATIONS[section.activation]
        self.gate = Linear(section.width, hidden, bias=section.bias)
        self.up = Linear(section.width, hidden, bias=section.bias)
        self.down = Linear(hidden, section.width, bias=section.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD)))


class PlainFeedForward(nn.Module):
    """down(act(up x)), with GELU or ReLU."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        hidden = hidden_width(section)
        self.activation = ACTIVATIONS[section.activation]
        self.up = Linear(section.width, hidden, bias=section.bias)
        self.down = Linear(hidden, section.width, bias=section.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.down(self.activation(self.up(x_BTD))))


def build_feed_forward(section: ModelSection) -> GatedFeedForward | PlainFeedForward:
    """Return the configured feed-forward block."""
    if section.activation in GATED:
        return GatedFeedForward(section)
    return PlainFeedForward(section)
