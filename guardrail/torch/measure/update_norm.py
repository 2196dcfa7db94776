"""The L2 norm of an optimizer's update, exactly: parameters are copied before the step and
subtracted after it.

A norm that is computed from gradients and learning rate would be a guess about the optimizer. The
copy costs the parameters once more in memory and three passes over them a step, so it is asked for
(`guard.log_update_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guardrail.torch.measure.gradient_norms import compute_norms, to_local
from guardrail.torch.state import foreach


class UpdateNorm:
    """Measures this rank's part of the last update; the next reduction makes one norm of all parts.

    Args:
        parameters: trainable ones, sharded or not.
        weights: [parameters], 1 / copies of each shard among the ranks that are summed over.

    Attributes:
        square: squared norm of the last update, 0-d; None while there was none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weights: Tensor) -> None:
        self._parameters = list(parameters)
        self._weights = weights
        self._before: list[Tensor] = []
        self.square: Tensor | None = None

    @torch.no_grad()
    def before(self) -> None:
        """Call before the optimizers step."""
        now = self._now()
        if not self._before:
            self._before = [torch.empty_like(tensor) for tensor in now]
        foreach.copy_tensors(self._before, now)

    @torch.no_grad()
    def after(self) -> None:
        """Call when they have stepped."""
        foreach.subtract_tensors(self._before, self._now())
        self.square = (
            torch.stack(compute_norms(self._before)).to(self._weights.dtype) ** 2 * self._weights
        ).sum()

    def _now(self) -> list[Tensor]:
        return [to_local(parameter).detach() for parameter in self._parameters]

    def facts(self) -> float | None:
        """What travels with a snapshot, or the first step after it would not know the update before
        it.
        """
        return None if self.square is None else float(self.square)

    def restore(self, square: float | None) -> None:
        self.square = None if square is None else self._weights.new_tensor(square)
