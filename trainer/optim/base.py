"""What the trainer needs to know of an optimizer. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class OptimSettings(Protocol):
    """The keys of `[optim]` that an optimizer may read."""

    @property
    def name(self) -> str: ...
    @property
    def implementation(self) -> Literal["fused", "foreach", "loop"]: ...
    @property
    def lr(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


class OptimizerSpec(ABC):
    """One optimizer: how to build it, and with what it works.

    Attributes:
        name: value of `optim.name`.
        help: what it is and its source, for the documentation.
        moments: fp32 numbers that it keeps per parameter, at most; for memory estimates.
        works_sharded: whether its state can be split like the parameters (fsdp).
        works_with_model_parallel: whether it works with tensor-parallel groups and pipelines.
        works_deferred: whether it works with `guard.decide = "deferred"`; torch must be able to
            skip its update on the device.
        works_stable: whether `optim.stable` applies to it; it needs AdamW's second moment.
        uses_betas: whether `optim.beta1` and `optim.beta2` have the meaning that Adam gives them.
        lr_is_relative: whether `optim.lr` is relative to the size of the parameters.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    moments: ClassVar[int]
    works_sharded: ClassVar[bool] = True
    works_with_model_parallel: ClassVar[bool] = False
    works_deferred: ClassVar[bool] = False
    works_stable: ClassVar[bool] = False
    uses_betas: ClassVar[bool] = True
    lr_is_relative: ClassVar[bool] = False

    @abstractmethod
    def build(self, model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
        """Return torch optimizers that together train all parameters of `model`.

        Import torch inside this method. Each parameter belongs to exactly one group of one
        optimizer. The learning rate of every group is set by the scheduler before each step.
        """
