"""Weights that show each part of a model in its output."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def draw_weights(module: M) -> M:
    """Draw weights of size one, so that every part matters in a comparison; return the module."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            size = 1.0
            if parameter.ndim > 1:
                size = 0.3
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module
