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

_UPDATES = foreach.GROWTH_TRACKER
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
        if read is None:
            state = self.scaler.state_dict()
        else:
            state = {**foreach.scaler_factors(self.scaler), "scale": read[0], _UPDATES: read[1]}
        scale, updates = float(state["scale"]), int(state[_UPDATES]) + 1
        if overflow:
            scale, updates = scale * state["backoff_factor"], 0
        elif updates >= state["growth_interval"]:
            updates = 0
            grown = scale * state["growth_factor"]
            if grown <= _LARGEST:
                scale = grown
        # Fills torch's tensors with host numbers, which waits for nothing.
        self.scaler.load_state_dict({**state, "scale": scale, _UPDATES: updates})
        return scale


def is_enabled(scaler: Any) -> bool:
    """Return whether a scaler scales: its own switch, for loops that run in every precision."""
    return scaler is not None and bool(scaler.is_enabled())
