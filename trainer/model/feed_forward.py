"""The feed-forward block, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.layers import Linear
from trainer.recipe import GATED, ModelSection
from trainer.sizes import hidden_width

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GatedFeedForward(nn.Module):
    """SwiGLU and GEGLU (Shazeer 2020): down(act(gate x) * up x); gate and up are one matrix."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        hidden = hidden_width(section)
        self.activation = ACTIVATIONS[section.activation]
        self.gate_up = Linear(section.width, 2 * hidden, bias=section.bias)
        self.down = Linear(hidden, section.width, bias=section.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return cast(Tensor, self.down(self.activation(gate_BTF) * up_BTF))


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


def feed_forward(section: ModelSection) -> GatedFeedForward | PlainFeedForward:
    return GatedFeedForward(section) if section.activation in GATED else PlainFeedForward(section)
