"""The loss scale of float16: overflow after overflow, or a scale far below its usual value.

A dynamic scale is raised until it overflows, once in about a thousand steps, and starts far too
high (65536). Single overflows, and a few consecutive ones at the start, are how it works: the
update is skipped and nothing is wrong with the weights. A scale that keeps falling is different.
Then the gradients themselves are too large or not finite, and halving only hides it (OPT, ChatGLM).
GLM-130B's scale fell for about 30 steps before the loss exploded.

`observe` is not asked about an overflow. The controller skips its update in any mode, counts it,
and asks `judge_overflows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS, LOSS_SCALE
from guardrail.detectors.base import Detector, DetectorParts, LogJumps, ReplaySign, format_ranks
from guardrail.detectors.baseline import SortedWindow
from guardrail.detectors.spike_settings import SpikeSettings

# Smallest number of consecutive overflows before the scale has settled: from 65536, where scalers
# begin, down to 1.
AT_START = 16
# Halvings below the usual scale that are a note.
FALL = 4


class ScaleCollapse(Detector):
    """Judges `loss_scale`.

    Args:
        settings: the history that the usual scale covers, and the steps before it has settled.
        overflows: consecutive overflows that no settled scale shows.
    """

    name = LOSS_SCALE
    kind = FindingKind.SCALE_COLLAPSE
    signals = (LOSS_SCALE,)
    severities = (Severity.NOTE, Severity.WEIGHTS_DAMAGED)
    Settings = SpikeSettings
    keys = (
        "rollback_after_overflows",
        "detectors.spike.history",
        "detectors.spike.min_history",
    )
    may_be_allowlisted = False  # its gradients are not finite
    replay_sign = ReplaySign.UNUSABLE_VALUE
    title = "Loss scale of fp16"
    help = """\
A dynamic loss scale overflows once in about a thousand steps, and more often at the start. That
is normal. The batch of an overflow is skipped in every mode. The detector finds a scale that
collapses.

- **Note:** the scale is 4 halvings or more below its median.
- **Persistent:** `rollback_after_overflows` (8) consecutive overflows. Before `min_history` accepted
  steps at least 16.
- Eight overflows divide the scale by 256.
- **Source:** OPT and ChatGLM saw scales that kept falling. GLM-130B's scale fell for about 30
  steps before the loss exploded.
- **Tests:** `tests/unit/detectors/test_loss_scale.py`, `tests/parallel/test_fp16.py`."""

    def __init__(self, settings: SpikeSettings, *, overflows: int) -> None:
        self.history, self.min_history = settings.history, settings.min_history
        self.overflows = overflows
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> ScaleCollapse:
        overflows = parts.options.rollback_after_overflows
        return cls(parts.settings(SpikeSettings), overflows=overflows)

    def reset(self) -> None:
        self._scales = SortedWindow(self.history)  # log2 of accepted ones
        self._low = 0  # step since which it has been low, 0: it is not
        self._last: float | None = None  # log2 of the last accepted one

    # -- judging -----------------------------------------------------------------------------------

    @property
    def _is_settled(self) -> bool:
        return len(self._scales) >= self.min_history

    def observe(self, obs: Observation) -> list[Finding]:
        log2 = _log2_scale(obs)
        if log2 is None or self._low or not self._has_fallen(log2):
            return []
        halvings = self._scales.median() - log2
        return [self._make(obs, Severity.NOTE, score=halvings, threshold=FALL)]

    def judge_overflows(self, obs: Observation, count: int) -> Finding | None:
        """Return a finding if the overflows are not the search for a scale; else None.

        It is reported again after as many more overflows, where no rollback followed.

        Args:
            obs: of the last overflow.
            count: consecutive overflows, with no update applied between them.
        """
        limit = self.overflows
        if not self._is_settled:
            limit = max(limit, AT_START)
        if count % limit:
            return None
        ranks = obs.nonfinite_grad
        return self._make(obs, Severity.WEIGHTS_DAMAGED, score=count, threshold=limit, ranks=ranks)

    def _make(
        self,
        obs: Observation,
        severity: Severity,
        *,
        score: float,
        threshold: float,
        ranks: tuple[int, ...] = (),
    ) -> Finding:
        return self.make_finding(
            obs,
            severity,
            signal=LOSS_SCALE,
            value=obs.signals.get(LOSS_SCALE, 0.0),
            baseline=2.0 ** self._scales.median() if len(self._scales) else 0.0,
            score=float(score),
            threshold=float(threshold),
            onset=self._low or obs.step,
            ranks=ranks,
        )

    def _has_fallen(self, log2: float) -> bool:
        return self._is_settled and log2 <= self._scales.median() - FALL

    def jump(self, obs: Observation) -> float:
        """Return log(scale / last accepted scale): the jump of a norm of scaled gradients."""
        now = _log2_scale(obs)
        if now is None or self._last is None:
            return 0.0
        return (now - self._last) * math.log(2.0)

    def first_suspect_step(self) -> int | None:
        return self._low or None

    # -- learning ----------------------------------------------------------------------------------

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        log2 = _log2_scale(obs)
        if log2 is None:
            return
        if not self._has_fallen(log2):
            self._low = 0
        elif not self._low:
            self._low = obs.step
        self._scales.push(log2)
        self._last = log2

    def state_dict(self) -> dict[str, Any]:
        return {"scales": list(self._scales.arrivals), "low": self._low, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scales = SortedWindow(self.history, map(float, state["scales"]))
        self._low = int(state["low"])
        last = state.get("last")
        self._last = None if last is None else float(last)

    # -- wording -----------------------------------------------------------------------------------

    @classmethod
    def sentence(cls, finding: Finding) -> str:
        text = f"{finding.signal} {finding.value:.6g}"
        if finding.baseline:
            text += f" (normal {finding.baseline:.6g})"
        if finding.severity is Severity.WEIGHTS_DAMAGED:
            text += f", {finding.score:.0f} consecutive overflows"
        return text + format_ranks(finding)

    @classmethod
    def explain_rollback(cls, finding: Finding) -> str:
        return f"of which {finding.threshold - 1:.0f} may be the search for a scale"


def overflows(obs: Observation) -> bool:
    """Return whether gradients exceed a loss scale that can still be lowered, with a finite loss.

    The guard knows its scaler and reports it (`Observation.overflow`). In a recorded log only the
    numbers show it.
    """
    scale = obs.signals.get(LOSS_SCALE)
    if scale is None or not 1.0 < scale < math.inf:
        return False
    if obs.nonfinite_loss or not math.isfinite(obs.signals.get(LOSS, 0.0)):
        return False
    norms = (obs.signals.get(GRAD_NORM, 0.0), obs.signals.get(EMBED_GRAD_NORM, 0.0))
    return bool(obs.nonfinite_grad) or not all(map(math.isfinite, norms))


def _log2_scale(obs: Observation) -> float | None:
    scale = obs.signals.get(LOSS_SCALE)
    if scale is None or not 0.0 < scale < math.inf:
        return None
    return math.log2(scale)
