"""The optimizers that `optim.name` can have. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.optim.adafactor import Adafactor
from trainer.optim.adam import Adam
from trainer.optim.adamw import AdamW
from trainer.optim.base import OptimizerSpec, OptimSettings
from trainer.optim.muon import Muon

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# A new optimizer: its file in this folder, and its line here.
OPTIMIZERS: tuple[OptimizerSpec, ...] = (
    AdamW(),
    Adam(),
    Adafactor(),
    Muon(),
)


def find_optimizer(name: str) -> OptimizerSpec:
    """Return the optimizer of this name. Raises KeyError for a name that is not registered."""
    for spec in OPTIMIZERS:
        if spec.name == name:
            return spec
    raise KeyError(name)


def build_optimizers(model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
    """Return the torch optimizers of a model, as `[optim]` asks for them."""
    return find_optimizer(settings.name).build(model, settings)


def names_of(*, having: str) -> list[str]:
    """Return the names of the optimizers whose attribute `having` is true."""
    return [spec.name for spec in OPTIMIZERS if getattr(spec, having)]
