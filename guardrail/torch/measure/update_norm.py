"""The exact L2 norm of an optimizer's update: the parameters after the step minus those before.

A norm computed from gradients and learning rate would be a guess about the optimizer. The copy
takes as much memory as the parameters and three passes over them per step, so it is optional
(`guard.log_update_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guardrail.torch.measure.gradient_norms import compute_norms, to_local
from guardrail.torch.state import foreach


class UpdateNorm:
    """Measures this rank's part of the last update; the next reduction sums the parts.

    Args:
        parameters: trainable ones, sharded or not.
        weights: [parameters], 1 / number of ranks that hold the same shard.

    Attributes:
        square: squared norm of the last update, 0-d; None before the first one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weights: Tensor) -> None:
        self._parameters = list(parameters)
        self._weights = weights
        self._before: list[Tensor] = []
        self.square: Tensor | None = None

    @torch.no_grad()
    def before(self) -> None:
        """Copy the parameters; call it before the optimizers step."""
        now = self._now()
        if not self._before:
            self._before = [torch.empty_like(tensor) for tensor in now]
        foreach.copy_tensors(self._before, now)

    @torch.no_grad()
    def after(self) -> None:
        """Measure the update; call it after the optimizers have stepped."""
        foreach.subtract_tensors(self._before, self._now())
        norms = torch.stack(compute_norms(self._before)).to(self._weights.dtype)
        self.square = (norms**2 * self._weights).sum()

    def _now(self) -> list[Tensor]:
        return [to_local(parameter).detach() for parameter in self._parameters]

    def facts(self) -> float | None:
        """Return what a snapshot holds, so that the first step after a restore has the norm too."""
        if self.square is None:
            return None
        return float(self.square)

    def restore(self, square: float | None) -> None:
        """Set what `facts` returned."""
        self.square = None
        if square is not None:
            self.square = self._weights.new_tensor(square)
