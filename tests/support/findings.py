"""Findings of a detector, for tests to which most of their values do not matter."""

from __future__ import annotations

import math
from typing import Any

from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.signals import LOSS


def make_finding(step: int, **changes: Any) -> Finding:
    """Return a loss spike at a step, or what `changes` make of it."""
    spike = {
        "signal": LOSS,
        "kind": FindingKind.LOSS_SPIKE,
        "severity": Severity.REJECT,
        "value": 11.5,
        "baseline": 2.31,
        "score": 41.2,
        "threshold": 8.0,
        "onset": step,
    }
    return Finding(step=step, **(spike | changes))


def make_nan_finding(step: int, **changes: Any) -> Finding:
    """Return a loss that is NaN at a step, or what `changes` make of it."""
    nan = {
        "kind": FindingKind.NONFINITE,
        "value": math.nan,
        "score": math.inf,
        "threshold": 0.0,
    }
    return make_finding(step, **(nan | changes))
