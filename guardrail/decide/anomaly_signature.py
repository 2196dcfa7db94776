"""One pass of a replay, and what it must show to have the anomaly of a rejected step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.core.records.findings import Finding, Observation, Severity
from guardrail.core.records.record import Record
from guardrail.detectors.base import ReplaySign
from guardrail.detectors.build import find_detector
from guardrail.detectors.impossible import Impossible
from guardrail.detectors.nonfinite import NonFinite

# Robust sigmas below which one signal alone is never rejected.
ALONE = 4.0


class ReplayPass(Record, frozen=True, kw_only=True):
    """One forward and backward pass over a global batch, after the reduction; equal on all ranks.

    Attributes:
        what: the batch, for a sentence: "the batch of step 30".
        signals: as in an Observation.
        nonfinite: NaN or Inf on some rank, even if the sums are finite.
    """

    what: str
    signals: dict[str, float]
    nonfinite: bool = False

    def is_broken(self) -> bool:
        """Return whether a loss or gradient is not a usable number."""
        flags = (0,) if self.nonfinite else ()
        obs = Observation(step=0, first=0, last=1, signals=self.signals, nonfinite_loss=flags)
        return bool(NonFinite().observe(obs) or Impossible().observe(obs))


class AnomalySignature(Record, frozen=True, kw_only=True):
    """What a pass must show to have the anomaly for which a step was rejected.

    Attributes:
        signal: of the most severe finding.
        nonfinite: the anomaly is a NaN, an Inf or a number that no model gives.
        limits: signal -> (baseline, limit); a value above the limit shows the anomaly. The limit is
            the detector's own threshold, or the logarithmic middle between baseline and rejected
            value if that is lower: a pass that is nearer to the anomaly than to the baseline shows
            it, even if the step was just above its threshold. A threshold that only counts together
            with others (see detectors.joint_cusum) is not used by itself.
        stuck: signal -> the number that does not change.
    """

    signal: str
    nonfinite: bool = False
    limits: dict[str, tuple[float, float]]
    stuck: dict[str, float]

    @property
    def is_level(self) -> bool:
        """Return whether numbers are only too high. New data cannot cause NaN or stuck numbers."""
        return not self.nonfinite and not self.stuck

    @classmethod
    def from_findings(cls, findings: Sequence[Finding]) -> AnomalySignature:
        """Return the signature of a verdict's findings, the most severe first."""
        severe = [finding for finding in findings if finding.severity is not Severity.NOTE]
        limits: dict[str, tuple[float, float]] = {}
        stuck: dict[str, float] = {}
        is_unusable = False
        for finding in reversed(severe):
            if 0.0 < finding.baseline < finding.value < math.inf:
                limits[finding.signal] = finding.baseline, _limit_of(finding)
        for finding in severe:
            sign = find_detector(finding.kind).replay_sign
            if sign is ReplaySign.UNUSABLE_VALUE:
                is_unusable = True
            elif sign is ReplaySign.SAME_VALUE:
                stuck[finding.signal] = finding.value
        signal = severe[0].signal if severe else ""
        return cls(signal=signal, nonfinite=is_unusable, limits=limits, stuck=stuck)

    def is_shown_by(
        self, one: ReplayPass, level: ReplayPass | None = None, *, all_signals: bool = False
    ) -> bool:
        """Return whether a pass shows this anomaly.

        Args:
            level: a healthy batch from the same state, if that is an older one: an older model has
                higher losses.
            all_signals: every signal must show it, not just one.
        """
        if one.is_broken():
            return True
        if any(one.signals.get(signal) == value for signal, value in self.stuck.items()):
            return True
        if self.nonfinite:
            return False  # it is finite now; what else was too high came with the NaN
        is_high: list[bool] = []
        for signal, (baseline, limit) in self.limits.items():
            factor = _level_factor(level, signal, baseline)
            is_high.append(one.signals.get(signal, 0.0) > limit * factor)
        if all_signals:
            return bool(is_high) and all(is_high)
        return any(is_high)

    def value_in(self, one: ReplayPass) -> float:
        """Return the value of `signal` in a pass; NaN if the pass has none."""
        return one.signals.get(self.signal, math.nan)

    def format_value(self, one: ReplayPass) -> str:
        """Return the value of `signal` in a pass, for a sentence."""
        return f"{self.value_in(one):.4g}"


def _level_factor(level: ReplayPass | None, signal: str, baseline: float) -> float:
    """Return by how much a healthy batch of an older state is above the baseline, at least 1."""
    if level is None:
        return 1.0
    factor = level.signals.get(signal, 0.0) / baseline
    if not math.isfinite(factor):
        return 1.0
    return max(1.0, factor)


def _limit_of(finding: Finding) -> float:
    jump = math.log(finding.value / finding.baseline)
    middle = finding.baseline * math.exp(jump / 2)
    if finding.severity is Severity.WEIGHTS_DAMAGED or not finding.score > 0:
        return middle
    # score = jump / scale and threshold = limit / scale, both in log units.
    threshold = max(finding.threshold, ALONE)
    return min(middle, finding.baseline * math.exp(min(jump, jump * threshold / finding.score)))
