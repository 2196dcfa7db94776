"""A batch in which every label is ignored: nothing to learn from, and a loss of 0/0.

The update is left out, since its gradient means nothing; the weights are not suspected, so such
batches never add up to a rollback, and their values enter no baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardrail.core.records import LOSS, Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps


class NoTokens:
    signals: tuple[str, ...] = ()

    def observe(self, obs: Observation) -> list[Finding]:
        if obs.tokens > 0:
            return []
        return [
            Finding(
                signal=LOSS,
                step=obs.step,
                kind=FindingKind.NO_TOKENS,
                severity=Severity.REJECT,
                value=obs.signals.get(LOSS, 0.0),
                baseline=0.0,
                score=0.0,
                threshold=0.0,
                onset=obs.step,
            )
        ]

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
