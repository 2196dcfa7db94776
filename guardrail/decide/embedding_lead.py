"""Whether an anomaly comes from the embedding. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE
from guardrail.core.records.verdicts import Action, Verdict

SIGNALS = (EMBED_GRAD_NORM, EMBED_SHARE)


def embedding_leads(findings: Sequence[Finding]) -> bool:
    """Return whether the anomaly comes from the embedding.

    Its norm or its share is rejected, and it is so alone, or first, or the share took over.
    """
    rejected = [finding for finding in findings if finding.severity is not Severity.NOTE]
    if any(finding.kind is FindingKind.NONFINITE for finding in rejected):
        return False
    own = [finding.onset for finding in rejected if finding.signal in SIGNALS]
    others = [finding.onset for finding in rejected if finding.signal not in SIGNALS]
    if not own:
        return False
    if any(finding.signal == EMBED_SHARE for finding in findings):
        return True
    return not others or min(own) < min(others)


def concerns_embedding(verdict: Verdict) -> bool:
    """Return whether a step is, or would be, rejected with a finite finding about the embedding.

    Then the tokens that dominate the embedding gradient are worth naming.
    """
    is_applied = verdict.action in (Action.APPLY, Action.FP16_OVERFLOW) and verdict.would is None
    if is_applied:
        return False
    return any(
        finding.signal in SIGNALS and math.isfinite(finding.value) for finding in verdict.findings
    )
