"""An example of a detector in one file: batches with far fewer label tokens than usual.

To use it, copy the file to `guardrail/detectors/` and add `TokenDrift` to `DETECTORS` in
`guardrail/detectors/build.py`. Its keys are then `[guard.detectors.token_drift]`.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.section import Fraction, Positive
from guardrail.detectors.base import Detector, DetectorParts, DetectorSettings, LogJumps


class TokenDriftSettings(DetectorSettings, frozen=True, kw_only=True):
    """[guard.detectors.token_drift]: batches with far fewer label tokens than usual."""

    table: ClassVar[str] = "token_drift"

    # A batch is noted below this share of the usual number of label tokens.
    least_share: Fraction = 0.5
    # Accepted steps whose median number of label tokens is the usual one.
    history: Positive = 32


class TokenDrift(Detector):
    """Notes a batch with far fewer label tokens than the batches before it."""

    name = "token_drift"
    kind = FindingKind("token_drift")
    watches = "label tokens of the batch"
    Settings = TokenDriftSettings
    keys = ("detectors.token_drift.least_share", "detectors.token_drift.history")
    title = "Batches with few labels"
    help = """\
- **Note:** the batch has less than `least_share` (0.5) of the usual number of label tokens.
- The usual number is the median of the last `history` (32) accepted steps.
- **Source:** an example; see `tests/support/examples/token_drift.py`."""

    def __init__(self, settings: TokenDriftSettings) -> None:
        self.settings = settings
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> TokenDrift:
        return cls(parts.settings(TokenDriftSettings))

    def reset(self) -> None:
        self._tokens: deque[int] = deque(maxlen=self.settings.history)

    def observe(self, obs: Observation) -> list[Finding]:
        if len(self._tokens) < self.settings.history:
            return []
        usual = statistics.median(self._tokens)
        limit = self.settings.least_share * usual
        if obs.tokens >= limit:
            return []
        return [
            self.make_finding(
                obs,
                Severity.NOTE,
                signal="tokens",
                value=obs.tokens,
                baseline=usual,
                threshold=limit,
            )
        ]

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        self._tokens.append(obs.tokens)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": list(self._tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._tokens.extend(map(int, state["tokens"]))

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        return f"{finding.value:.0f} label tokens, usually {finding.baseline:.0f}"
