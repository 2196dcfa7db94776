"""The loss scale of fp16, moved by the step's one verdict.

torch's GradScaler looks for overflows on each device and asks the other ranks once more; here the
packed vector has told every rank already, so the guard moves the scale by torch's rule and each
rank holds the same one. The object stays torch's own (Accelerate's `accelerator.scaler` too), and
its state dict is what a snapshot or a checkpoint keeps.
"""

from __future__ import annotations

import math
from typing import Any

from guardrail.torch.state.foreach import GROWTH_TRACKER


class LossScale:
    """Args:
    scaler: a torch.amp.GradScaler that multiplies the loss: `scaler.scale(loss).backward()`. Its
        `unscale_`, `step` and `update` are never called; the gate divides the gradients by the
        scale together with clipping.
    """

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler

    @property
    def value(self) -> float:
        return float(self.scaler.get_scale())

    def update(self, *, overflow: bool) -> float:
        """Down after an overflow, up after `growth_interval` updates without one; returns the new
        scale.

        The rule of torch's `_amp_update_scale_` (Micikevicius et al. 2018, section 3.2): a scale
        that would become infinite stays.
        """
        state = self.scaler.state_dict()
        scale, applied = float(state["scale"]), int(state[GROWTH_TRACKER]) + 1
        if overflow:
            scale, applied = scale * state["backoff_factor"], 0
        elif applied >= state["growth_interval"]:
            grown = scale * state["growth_factor"]
            scale, applied = (grown if grown <= _LARGEST else scale), 0
        self.scaler.load_state_dict({**state, "scale": scale, GROWTH_TRACKER: applied})
        return scale


_LARGEST = math.ldexp(2 - 2**-23, 127)  # of float32, in which torch keeps the scale


def enabled(scaler: Any) -> bool:
    """Whether it scales at all: torch's own switch, for a loop that is written once for every
    precision.
    """
    return scaler is not None and bool(scaler.is_enabled())
