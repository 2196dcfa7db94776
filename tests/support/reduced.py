"""The numbers of one step after the reduction, for tests to which most of them do not matter."""

from __future__ import annotations

from typing import Any

from guardrail.torch.measure.reduced_step import ReducedStep


def make_reduced(loss: float = 2.0, **changes: Any) -> ReducedStep:
    """Return the numbers of a healthy step on one rank, or what `changes` make of them."""
    healthy = {
        "loss": loss,
        "tokens": 8,
        "grad_norm": 1.0,
        "embed_grad_norm": 0.0,
        "embed_share": 0.0,
        "scale": 1.0,
        "loss_scale": None,
        "overflow": False,
        "nonfinite_loss": (),
        "nonfinite_grad": (),
        "step_times": (0.1,),
        "command_kind": 0,
        "command_value": 0.0,
        "stop": 0,
        "incomplete": 0,
    }
    return ReducedStep(**(healthy | changes))
