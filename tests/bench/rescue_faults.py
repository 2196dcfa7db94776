"""The faults of the rescue benchmark. Each acts in the middle of the run, or from the beginning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BATCH = 16
STEPS = 240
HEALTHY = "none"
# held-out batches are shared out among the ranks, so that they are others
HEALTHY_TWO = "none, two ranks"
DATA, STATE, HARDWARE = "data", "state", "not reproducible"
BOTH = "data, only from this state"

Sections = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Staged:
    """One fault.

    Attributes:
        what: its description.
        causes: the right diagnoses; empty: no diagnosis is expected.
        faults: (step at which it acts) -> [[faults]] of the configuration.
        sections: of the configuration, changed for this run.
        world: ranks.
    """

    what: str
    causes: tuple[str, ...] = ()
    at: Callable[[int], Sections] = lambda step: []
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    world: int = 1

    def faults(self, steps: int) -> Sections:
        return self.at(steps // 2)


def healthy(fault: str) -> str:
    """Return the run without a fault that this one is compared with."""
    return HEALTHY if FAULTS[fault].world == 1 else HEALTHY_TWO


def text(kind: str, batches: int) -> Callable[[int], Sections]:
    """Damage all samples of `batches` consecutive batches."""
    return lambda step: [
        {"kind": kind, "first": (step - 1) * BATCH, "last": (step - 1 + batches) * BATCH}
    ]


def once(kind: str, **settings: Any) -> Callable[[int], Sections]:
    return lambda step: [{"kind": kind, "step": step, "times": 1, **settings}]


def persistent_nan(step: int) -> Sections:
    """Make each tenth batch NaN, from there to the end of the run."""
    return [
        {"kind": "nan_loss", "first": at * BATCH, "last": at * BATCH + 1}
        for at in range(step, 4 * step, 10)
    ]


FAULTS = {
    HEALTHY: Staged(what="nothing"),
    HEALTHY_TWO: Staged(what="nothing, on two ranks", world=2),
    "corrupted documents": Staged(
        what="six batches of noise", causes=(DATA,), at=text("noise_tokens", 6)
    ),
    "repeated n-grams": Staged(
        what="six batches of one n-gram", causes=(DATA,), at=text("repeat_tokens", 6)
    ),
    "label noise": Staged(
        what="labels shuffled in ten batches", causes=(DATA,), at=text("shuffle_labels", 10)
    ),
    "rate x30, 20 attempts": Staged(
        what="the rate is 30 times too high, 20 attempts long",
        causes=(STATE,),
        at=lambda step: [
            {"kind": "scale_lr", "step": step, "steps": 10**6, "times": 20, "value": 30.0}
        ],
    ),
    "rate x30, 20 steps": Staged(
        what="as before, and again whenever these 20 steps are done again",
        causes=(STATE,),
        at=lambda step: [{"kind": "scale_lr", "step": step, "steps": 20, "value": 30.0}],
    ),
    "no warm-up": Staged(
        what="no warm-up, ten times the rate",
        causes=(STATE,),
        sections={"optim": {"lr": 3e-2, "warmup_steps": 0}},
    ),
    "beta2 too high": Staged(
        what="beta2 0.99999, eps 1e-15, three times the rate",
        causes=(STATE,),
        sections={"optim": {"lr": 1e-2, "beta2": 0.99999, "eps": 1e-15}},
    ),
    "NaN in a gradient": Staged(what="one entry, once", causes=(HARDWARE,), at=once("nan_grad")),
    "bit flip, weight": Staged(
        what="highest exponent bit of one entry",
        causes=(STATE,),
        at=once("flip_weight", value=30, entry=100),
    ),
    "bit flip, moment": Staged(
        what="highest exponent bit of one first moment",
        causes=(STATE,),
        at=once("flip_moment", value=30, entry=100),
    ),
    "embedding row": Staged(
        what="the row of the letter e times 1000",
        causes=(STATE,),
        at=once("scale_row", value=1000.0, entry=101),
    ),
    "weights x1000": Staged(
        what="all of them", causes=(STATE,), at=once("scale_weights", value=1000.0)
    ),
    "NaN data": Staged(
        what="a NaN in each tenth batch, to the end", causes=(DATA,), at=persistent_nan
    ),
    "garbage rank": Staged(
        what="one of two ranks computes noise, 100 times too large, 5 attempts long",
        causes=(HARDWARE,),
        at=lambda step: [
            {
                "kind": "garbage_grad",
                "step": step,
                "steps": 10**6,
                "times": 5,
                "rank": 1,
                "value": 100.0,
            }
        ],
        world=2,
    ),
    "moments zeroed": Staged(what="both of Adam's", causes=(STATE,), at=once("zero_moments")),
}
