"""NaN, Inf, and numbers that no working model gives. Speaks from the first step; needs no baseline.

A NaN that one rank alone saw arrives here twice: as that rank's flag and as NaN in the sum over
ranks.

Under a loss scale (float16) an infinite gradient beside a finite loss is an overflow, part of how
the scale is found, and does not come here; scale.py says when there are too many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records import (
    EMBED_GRAD_NORM,
    GRAD_NORM,
    LOSS,
    Finding,
    FindingKind,
    Observation,
    Severity,
)
from guardrail.detectors.base import LogJumps

WATCHED = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)
# sqrt of the largest float32: beyond it a square overflows, so a norm or a loss has lost all
# meaning. Logs of runs that ended in NaN show such values (1e30) in the rows before.
ABSURD = 1.8e19


class NonFinite:
    """Rejects a step whose loss or gradient is not a usable number, and names the ranks that saw it
    themselves.

    Attributes:
        zero: what a loss of exactly 0 is worth; None where such a loss is healthy (see
        signed_loss.py).
    """

    zero: Severity | None = Severity.REJECT

    signals: tuple[str, ...] = ()  # the flags speak without any

    def observe(self, obs: Observation) -> list[Finding]:
        signals = obs.signals
        flagged = {}
        if obs.nonfinite_loss or obs.nonfinite_grad:
            flagged = {LOSS: obs.nonfinite_loss, GRAD_NORM: obs.nonfinite_grad}
        findings: list[Finding] = []
        for signal in WATCHED:
            value = signals.get(signal)
            if not flagged and (value is None or 0.0 < value <= ABSURD):
                continue
            ranks = flagged.get(signal, ())
            if ranks or (value is not None and not math.isfinite(value)):
                # A flagged rank makes the step non-finite even if the reduced number happens to be
                # finite.
                value = math.nan if value is None or math.isfinite(value) else value
                findings.append(_finding(obs, signal, FindingKind.NONFINITE, value, ranks))
            elif value is not None and abs(value) > ABSURD:
                findings.append(_finding(obs, signal, FindingKind.IMPOSSIBLE, value, ranks))
            elif value == 0.0 and signal == LOSS and self.zero is not None:
                # A cross-entropy of exactly 0 means that no token was scored, or that the loss is
                # disconnected.
                findings.append(
                    _finding(obs, signal, FindingKind.IMPOSSIBLE, value, ranks, severity=self.zero)
                )
        return findings

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        """Nothing to learn."""

    def first_suspect_step(self) -> None:
        return None

    def band(self) -> None:
        return None

    def reset(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state."""


def _finding(
    obs: Observation,
    signal: str,
    kind: FindingKind,
    value: float,
    ranks: tuple[int, ...],
    *,
    severity: Severity = Severity.REJECT,
) -> Finding:
    return Finding(
        signal=signal,
        step=obs.step,
        kind=kind,
        severity=severity,
        value=value,
        baseline=0.0,
        score=0.0,
        threshold=0.0,
        onset=obs.step,
        ranks=ranks,
    )
