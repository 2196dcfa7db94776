"""A batch in which every label is ignored. There is nothing to learn from, and the loss is 0/0.

Its gradient means nothing, so the update is skipped. The weights are not suspect: such batches
never add up to a rollback, and their values enter no baseline.
"""

from __future__ import annotations

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.detectors.base import Detector


class NoTokens(Detector):
    """Rejects a batch without label tokens. Every other finding about it would be noise."""

    name = "no_tokens"
    kind = FindingKind.NO_TOKENS
    severities = (Severity.REJECT,)
    may_be_allowlisted = False  # its update has no meaning
    is_anomaly = False
    title = "Batches without labels"
    help = """\
- **Limit:** every label of the batch is ignored, so the loss is 0/0. The update is skipped.
- Such batches never add up to a rollback, and their values enter no baseline.
- **Test:** `tests/parallel/test_cases.py` (case 10)."""

    def observe(self, obs: Observation) -> list[Finding]:
        if obs.tokens > 0:
            return []
        value = obs.signals.get(LOSS, 0.0)
        return [self.make_finding(obs, Severity.REJECT, signal=LOSS, value=value)]

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        return "no label token in the batch"
