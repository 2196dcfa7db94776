"""Linear, embedding and norm as the models use them.

A model draws all of its weights at once, from one generator. torch's initialisation at construction
is skipped, since it would only change the global RNG state.
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
    """Return the configured norm over the last dimension.

    RMSNorm (Zhang & Sennrich 2019) divides by the root mean square and has no bias. LayerNorm (Ba et
    al. 2016) subtracts the mean too.

    Args:
        width: of the last dimension; 0: section.width.
    """
    width = width or section.width
    if section.norm == "rms":
        return nn.RMSNorm(width, eps=section.norm_eps)
    return nn.LayerNorm(width, eps=section.norm_eps, bias=section.bias)
