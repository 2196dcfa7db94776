"""Linear, embedding and norm as the models use them: a model draws all of its weights at once, from
one generator.

torch's own draw at construction would only move the global dice, so it is left out.
"""

from __future__ import annotations

from torch import nn

from trainer.config.recipe import ModelSection

NORMS = (nn.RMSNorm, nn.LayerNorm)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


def build_norm(section: ModelSection, width: int = 0) -> nn.RMSNorm | nn.LayerNorm:
    """The configured norm over the last dimension, `section.width` wide unless said otherwise.

    RMSNorm (Zhang & Sennrich 2019) divides by the root mean square and has no bias; LayerNorm (Ba
    et al. 2016) takes the mean away as well.
    """
    width = width or section.width
    if section.norm == "rms":
        return nn.RMSNorm(width, eps=section.norm_eps)
    return nn.LayerNorm(width, eps=section.norm_eps, bias=section.bias)
