"""The loss scale of float16: overflow after overflow, or a scale that falls far below what has been
usual.

A dynamic scale is raised until it overflows, once in a thousand steps or so, and starts far too
high (65536): single overflows, and a few in a row at the start, are how it works. The update is
left out and nothing is wrong with the weights. A scale that keeps falling is another matter: then
the gradients themselves are too large or not finite, and halving only hides it (OPT, ChatGLM).
GLM-130B's fell for about 30 steps before the loss exploded.

An overflow never comes to `observe`: the controller leaves the update out in any mode, counts, and
asks `collapsed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records import (
    EMBED_GRAD_NORM,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    Finding,
    FindingKind,
    Observation,
    Severity,
)
from guardrail.detectors.base import LogJumps
from guardrail.detectors.baseline import SortedWindow

# Overflows in a row, at least, before the scale has settled: from 65536, where scalers begin, down
# to 1.
AT_START = 16
# Halvings below the usual scale that are worth a note.
FALL = 4


class ScaleCollapse:
    """Watches `loss_scale`.

    Args:
        window, warmup: accepted steps in the usual scale, and before it is settled.
        overflows: in a row that no settled scale shows.
    """

    signals = (LOSS_SCALE,)

    def __init__(self, *, window: int, warmup: int, overflows: int) -> None:
        self.window, self.warmup, self.overflows = window, warmup, overflows
        self.reset()

    def reset(self) -> None:
        self._scales = SortedWindow(self.window)  # log2 of accepted ones
        self._low = 0  # step since which it has been low, 0: it is not
        self._last: float | None = None  # log2 of the last accepted one

    @property
    def _settled(self) -> bool:
        return len(self._scales) >= self.warmup

    def observe(self, obs: Observation) -> list[Finding]:
        halvings = _halvings(obs)
        if halvings is None:
            return []
        if self._low or not self._fallen(halvings):
            return []
        return [
            self._finding(
                obs, Severity.NOTE, score=self._scales.median() - halvings, threshold=FALL
            )
        ]

    def collapsed(self, obs: Observation, row: int) -> Finding | None:
        """Whether `row` overflows, this one the last, with no update applied between them, are no
        search for a scale.

        Told again after as many more, where nobody has gone back.
        """
        limit = self.overflows if self._settled else max(self.overflows, AT_START)
        if row % limit:
            return None
        return self._finding(
            obs, Severity.PERSISTENT, score=row, threshold=limit, ranks=obs.nonfinite_grad
        )

    def _finding(
        self,
        obs: Observation,
        severity: Severity,
        *,
        score: float,
        threshold: float,
        ranks: tuple[int, ...] = (),
    ) -> Finding:
        return Finding(
            signal=LOSS_SCALE,
            step=obs.step,
            kind=FindingKind.SCALE_COLLAPSE,
            severity=severity,
            value=obs.signals.get(LOSS_SCALE, 0.0),
            baseline=2.0 ** self._scales.median() if len(self._scales) else 0.0,
            score=float(score),
            threshold=float(threshold),
            onset=self._low or obs.step,
            ranks=ranks,
        )

    def _fallen(self, halvings: float) -> bool:
        return self._settled and halvings <= self._scales.median() - FALL

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        halvings = _halvings(obs)
        if halvings is None:
            return
        if self._fallen(halvings):
            self._low = self._low or obs.step
        else:
            self._low = 0
        self._scales.push(halvings)
        self._last = halvings

    def jump(self, obs: Observation) -> float:
        """log(scale / scale of the last accepted step): what a norm of scaled gradients has jumped
        by through it.
        """
        now = _halvings(obs)
        return 0.0 if now is None or self._last is None else (now - self._last) * math.log(2.0)

    def first_suspect_step(self) -> int | None:
        return self._low or None

    def band(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"scales": list(self._scales.arrivals), "low": self._low, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scales = SortedWindow(self.window, map(float, state["scales"]))
        self._low = int(state["low"])
        last = state.get("last")
        self._last = None if last is None else float(last)


def overflows(obs: Observation) -> bool:
    """Whether gradients are beyond a loss scale that can still be lowered, and the loss itself is
    sound.

    The guard knows its scaler and says so itself (`Observation.overflow`); of a recorded log this
    is what can be told.
    """
    scale = obs.signals.get(LOSS_SCALE)
    if scale is None or not 1.0 < scale < math.inf:
        return False
    if obs.nonfinite_loss or not math.isfinite(obs.signals.get(LOSS, 0.0)):
        return False
    norms = (obs.signals.get(GRAD_NORM, 0.0), obs.signals.get(EMBED_GRAD_NORM, 0.0))
    return bool(obs.nonfinite_grad) or not all(map(math.isfinite, norms))


def _halvings(obs: Observation) -> float | None:
    """log2 of the scale."""
    scale = obs.signals.get(LOSS_SCALE)
    return math.log2(scale) if scale is not None and 0.0 < scale < math.inf else None
