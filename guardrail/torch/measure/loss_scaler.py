"""The loss scale of fp16, changed by the step's one verdict.

torch's GradScaler looks for overflows on each device and asks the other ranks once more. Here the
packed vector already says so on every rank. So the guard changes the scale by torch's rule, and all
ranks have the same one. The object stays torch's own (or Accelerate's `accelerator.scaler`), and
snapshots and checkpoints hold its state dict.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from guardrail.torch.state import foreach

_LARGEST = math.ldexp(2 - 2**-23, 127)  # of float32, in which torch keeps the scale


class LossScale:
    """The scale of one GradScaler.

    Args:
        scaler: a torch.amp.GradScaler that multiplies the loss: `scaler.scale(loss).backward()`.
            Its `unscale_`, `step` and `update` are never called: the gate divides the gradients by
            the scale together with clipping.
    """

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler
        # (scale, updates since the last overflow), as the device had them in this step
        self._read: tuple[float, int] | None = None

    def tensors(self) -> list[Tensor]:
        """Return scale and updates since the last overflow, 0-d; []: they are on no device."""
        self._read = None
        return foreach.scaler_tensors(self.scaler)

    def take(self, scale: float, updates: float) -> None:
        """Take over the values of `tensors`, until `update` changes them."""
        self._read = (scale, int(updates))

    @property
    def value(self) -> float:
        """The present scale. Waits for the device unless `take` has brought it."""
        if self._read is not None:
            return self._read[0]
        return float(self.scaler.get_scale())

    def update(self, *, overflow: bool) -> float:
        """Lower the scale after an overflow, raise it after `growth_interval` updates without one.

        The rule of torch's `_amp_update_scale_` (Micikevicius et al. 2018, section 3.2): a scale
        that would become infinite stays as it is.

        Returns:
            The new scale.
        """
        read, self._read = self._read, None
        if read is not None:
            factors = foreach.scaler_factors(self.scaler)
            scale, updates = _next_scale(*read, overflow=overflow, **factors)
            foreach.set_scaler(self.scaler, scale=scale, updates=updates)
            return scale
        state = self.scaler.state_dict()
        scale, updates = _next_scale(
            float(state["scale"]),
            int(state[foreach.GROWTH_TRACKER]),
            overflow=overflow,
            growth=state["growth_factor"],
            backoff=state["backoff_factor"],
            interval=state["growth_interval"],
        )
        self.scaler.load_state_dict({**state, "scale": scale, foreach.GROWTH_TRACKER: updates})
        return scale


def _next_scale(
    scale: float, updates: int, *, overflow: bool, growth: float, backoff: float, interval: int
) -> tuple[float, int]:
    """Return the scale after a step, and the updates since the last change."""
    if overflow:
        return scale * backoff, 0
    if updates + 1 < interval:
        return scale, updates + 1
    grown = scale * growth
    if grown > _LARGEST:
        grown = scale
    return grown, 0


def is_enabled(scaler: Any) -> bool:
    """Return whether a scaler scales: its own switch, for loops that run in every precision."""
    return scaler is not None and bool(scaler.is_enabled())
