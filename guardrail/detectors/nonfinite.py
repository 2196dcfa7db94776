"""NaN and Inf in the loss or a gradient. Active from the first step; needs no baseline.

A NaN on a single rank is reported twice: as the flag of that rank, and as NaN in the sum over the
ranks.

Under a loss scale (float16), an infinite gradient with a finite loss is an overflow. That is part
of the search for the scale and is not reported here. `loss_scale.py` reports when there are too
many.
"""

from __future__ import annotations

import math

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.detectors.base import Detector, ReplaySign, format_ranks

SIGNALS = (LOSS, GRAD_NORM, EMBED_GRAD_NORM)


class NonFinite(Detector):
    """Rejects a step with NaN or Inf, and names the ranks that computed it."""

    name = "nonfinite"
    kind = FindingKind.NONFINITE
    signals = ()  # the flags of the ranks count in a step without any signal
    watches = "loss, grad_norm, embed_grad_norm"
    severities = (Severity.REJECT,)
    may_be_allowlisted = False  # an update with NaN has no meaning
    has_unusable_value = True
    replay_sign = ReplaySign.UNUSABLE_VALUE
    title = "NaN and Inf"
    help = """\
- **Limit:** NaN or Inf in `loss`, `grad_norm` or `embed_grad_norm`.
- It is active from the first step and needs no baseline.
- It names the ranks that saw the value themselves.
- Under a loss scale, an infinite gradient with a finite loss is an overflow. It does not come
  here.
- **Test:** `tests/unit/detectors/test_nonfinite.py`."""

    def observe(self, obs: Observation) -> list[Finding]:
        is_flagged = obs.nonfinite_loss or obs.nonfinite_grad
        findings: list[Finding] = []
        for signal in SIGNALS:
            value = obs.signals.get(signal)
            is_usable = value is None or -math.inf < value < math.inf
            if is_usable and not is_flagged:
                continue
            ranks = flagged_ranks(obs, signal)
            if is_usable and not ranks:
                continue
            # A flagged rank makes the step non-finite, even if the reduced number is finite.
            if value is None or math.isfinite(value):
                value = math.nan
            findings.append(
                self.make_finding(obs, Severity.REJECT, signal=signal, value=value, ranks=ranks)
            )
        return findings

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        return f"{finding.signal} is {finding.value:.4g}{format_ranks(finding)}"


def flagged_ranks(obs: Observation, signal: str) -> tuple[int, ...]:
    """Return the ranks that computed NaN or Inf in this signal before the reduction."""
    if signal == LOSS:
        return obs.nonfinite_loss
    if signal == GRAD_NORM:
        return obs.nonfinite_grad
    return ()
