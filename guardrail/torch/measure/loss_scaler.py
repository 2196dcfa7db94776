"""The loss scale of fp16, changed by the step's one verdict.

torch's GradScaler looks for overflows on each device and asks the other ranks once more. Here the
packed vector already says so on every rank. So the guard changes the scale by torch's rule, and all
ranks have the same one. The object stays torch's own (or Accelerate's `accelerator.scaler`), and
snapshots and checkpoints hold its state dict.
"""

from __future__ import annotations

import math
from typing import Any

from guardrail.torch.state.foreach import GROWTH_TRACKER

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

    @property
    def value(self) -> float:
        """The present scale."""
        return float(self.scaler.get_scale())

    def update(self, *, overflow: bool) -> float:
        """Lower the scale after an overflow, raise it after `growth_interval` updates without one.

        The rule of torch's `_amp_update_scale_` (Micikevicius et al. 2018, section 3.2): a scale
        that would become infinite stays as it is.

        Returns:
            The new scale.
        """
        state = self.scaler.state_dict()
        scale, applied = float(state["scale"]), int(state[GROWTH_TRACKER]) + 1
        if overflow:
            scale, applied = scale * state["backoff_factor"], 0
        elif applied >= state["growth_interval"]:
            applied = 0
            grown = scale * state["growth_factor"]
            if grown <= _LARGEST:
                scale = grown
        self.scaler.load_state_dict({**state, "scale": scale, GROWTH_TRACKER: applied})
        return scale


def is_enabled(scaler: Any) -> bool:
    """Return whether a scaler scales: its own switch, for loops that run in every precision."""
    return scaler is not None and bool(scaler.is_enabled())
