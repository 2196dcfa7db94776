"""Finite numbers that no working model gives. Active from the first step; needs no baseline."""

from __future__ import annotations

import math

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import LOSS
from guardrail.detectors.base import Detector, ReplaySign, format_ranks
from guardrail.detectors.nonfinite import SIGNALS, flagged_ranks

# The square root of the largest float32. The square of a larger number overflows, so a norm or a
# loss above it has no meaning. Logs of runs that ended in NaN have such values (1e30) in the rows
# before.
LARGEST = 1.8e19


class Impossible(Detector):
    """Rejects a step whose loss or gradient is a finite number that no model gives.

    Attributes:
        zero_loss: severity of a loss of exactly 0; None: such a loss is healthy (see
            signed_loss.py).
    """

    name = "impossible"
    kind = FindingKind.IMPOSSIBLE
    signals = ()
    watches = "loss, grad_norm, embed_grad_norm"
    severities = (Severity.NOTE, Severity.REJECT)
    has_unusable_value = True
    replay_sign = ReplaySign.UNUSABLE_VALUE
    title = "Impossible numbers"
    help = """\
- **Limit:** `loss`, `grad_norm` or `embed_grad_norm` above 1.8e19 (the square root of the largest
  float32), or a loss of exactly 0.
- It is active from the first step and needs no baseline.
- A loss of exactly 0 means that no token was scored, or that the loss is not connected to the
  model. It is rejected for a positive loss. It is a note while the kind of the loss is not known,
  and nothing for a signed loss.
- **Test:** `tests/unit/detectors/test_nonfinite.py`."""

    zero_loss: Severity | None = Severity.REJECT

    def observe(self, obs: Observation) -> list[Finding]:
        findings = []
        for signal in SIGNALS:
            value = obs.signals.get(signal)
            if value is None or 0.0 < value <= LARGEST or not math.isfinite(value):
                continue
            if flagged_ranks(obs, signal):
                continue  # of some rank it is NaN or Inf
            if abs(value) > LARGEST:
                severity: Severity | None = Severity.REJECT
            elif value == 0.0 and signal == LOSS:
                severity = self.zero_loss
            else:
                continue
            if severity is not None:
                findings.append(self.make_finding(obs, severity, signal=signal, value=value))
        return findings

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        if finding.value == 0.0:
            # "%g" would print a tiny number as 0 as well.
            return (
                f"{finding.signal} is exactly 0: check that labels are not all masked and that the "
                "model computes the loss"
            )
        return f"{finding.signal} is {finding.value:.4g}{format_ranks(finding)}"
