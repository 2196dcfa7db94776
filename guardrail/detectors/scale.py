"""The loss scale of float16: overflow after overflow, or a scale that falls far below what has been usual.

A dynamic scale is raised until it overflows, once in a thousand steps or so, and starts far too high (65536): single
overflows, and a few in a row at the start, are how it works. The update is left out and nothing is wrong with the
weights. A scale that keeps falling is another matter: then the gradients themselves are too large or not finite, and
halving only hides it (OPT, ChatGLM). GLM-130B's fell for about 30 steps before the loss exploded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.detectors.base import Jumps
from guardrail.detectors.baseline import SortedWindow
from guardrail.detectors.nonfinite import overflows
from guardrail.records import LOSS_SCALE, Finding, Kind, Observation, Severity

# Overflows in a row that no working scale shows: five halvings are a factor of 32, where a peak of the activations
# asks for two or three.
IN_A_ROW = 5
# The same before the scale has settled: from 65536, where scalers begin, down to 1.
AT_START = 16
# Halvings below the usual scale that are worth a note.
FALL = 4


class ScaleCollapse:
    """Watches `loss_scale`.

    Args:
        window, warmup: accepted steps in the usual scale, and before it is settled.
    """

    signals = (LOSS_SCALE,)

    def __init__(self, *, window: int, warmup: int) -> None:
        self.window = window
        self.warmup = warmup
        self.reset()

    def reset(self) -> None:
        self._scales = SortedWindow(self.window)  # log2 of accepted ones
        self._low = 0  # step since which it has been low, 0: it is not

    @property
    def _settled(self) -> bool:
        return len(self._scales) >= self.warmup

    def observe(self, obs: Observation) -> list[Finding]:
        halvings = _halvings(obs)
        if halvings is None:
            return []
        usual = self._scales.median() if len(self._scales) else halvings
        row = obs.streak + 1 if overflows(obs) else 0
        limit = IN_A_ROW if self._settled else AT_START
        if row >= limit:
            severity, score, threshold = Severity.PERSISTENT, float(row), float(limit)
        elif self._fallen(halvings) and not self._low:
            severity, score, threshold = Severity.NOTE, usual - halvings, float(FALL)
        else:
            return []
        return [
            Finding(
                signal=LOSS_SCALE,
                step=obs.step,
                kind=Kind.SCALE_COLLAPSE,
                severity=severity,
                value=2.0**halvings,
                baseline=2.0**usual,
                score=score,
                threshold=threshold,
                onset=self._low or obs.step,
            )
        ]

    def _fallen(self, halvings: float) -> bool:
        return self._settled and halvings <= self._scales.median() - FALL

    def accept(self, obs: Observation, left_out: Sequence[Jumps] = ()) -> None:
        halvings = _halvings(obs)
        if halvings is None:
            return
        if self._fallen(halvings):
            self._low = self._low or obs.step
        else:
            self._low = 0
        self._scales.push(halvings)

    def suspect_from(self) -> int | None:
        return self._low or None

    def band(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"scales": list(self._scales.arrivals), "low": self._low}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scales = SortedWindow(self.window, map(float, state["scales"]))
        self._low = int(state["low"])


def _halvings(obs: Observation) -> float | None:
    """log2 of the scale."""
    scale = obs.signals.get(LOSS_SCALE)
    return math.log2(scale) if scale is not None and 0.0 < scale < math.inf else None
