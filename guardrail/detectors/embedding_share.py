"""The embedding takes over the gradient: its share of the squared norm goes towards 1.

GLM-130B's spikes began in the embedding layer. Its gradients grew orders of magnitude above all
others. With global clipping, the gradients of all other layers then become too small.

The share lies between 0 and 1, so its distance is measured in log odds. The centre is the median of
the complete history, not of the last few values as for spikes. A share that grows over fifty steps
would raise a fast centre too.

note      The share is far above its history, and more than half of all. It is reported once, until
          the share is normal again or has a new level.
reject    In addition the norm of the embedding gradients is near its limit. The update would change
          the embedding by far more than usual. A share that grew because the other gradients
          shrank is not rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import EMBED_SHARE
from guardrail.detectors.base import Detector, DetectorParts, LogJumps
from guardrail.detectors.baseline import Baseline, SortedWindow
from guardrail.detectors.spike import BELOW, NEW_LEVEL, NOTE_SHARE, Spike
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import EmbedNormSpike, spike_keys

# Smallest scale in log odds. With a threshold of 10, no rise by less than 7.4 times the odds
# counts, as for the norms.
FLOOR = 0.2
# A share above this counts as taking over.
MOST = 0.5
# The embedding's norm agrees from this share of its limit on. Two signals together need less than
# one alone.
AGREE = 0.8
# A share of exactly 0 or 1 has no log odds; 1 - 1e-9 is the nearest that is distinguished.
EDGE = 1e-9


class EmbeddingShare(Detector):
    """Judges `embed_share`.

    Args:
        embedding: the spike detector of the embedding's norm: whether that norm is high.
        settings: its threshold in robust sigmas of the log odds, and the history. From `NOTE_SHARE`
            of the threshold on, the share is too high.
    """

    name = EMBED_SHARE
    kind = FindingKind.EMBED_SPIKE
    signals = (EMBED_SHARE,)
    severities = (Severity.NOTE, Severity.REJECT)
    Settings = SpikeSettings
    keys = spike_keys("embed_threshold")
    judges_one_value = True
    is_harmless_with_clipping = True
    title = "Share of the embedding"
    help = """\
- **Note:** the share is above 0.5, and its log odds exceed 0.6 x `embed_threshold` robust standard
  deviations.
- **Reject:** in addition, the embedding's norm exceeds 0.8 of its own limit.
- A share that grew because the other gradients shrank is not rejected.
- The centre is the median of the last `history` values, so a share that grows over fifty
  steps is found.
- Eight consecutive accepted values above the limit are a new level.
- **Source:** GLM-130B, whose spikes began in the embedding layer. See [Embedding
  shrink](embedding-shrink.md).
- **Test:** `tests/unit/detectors/test_embedding_share.py`."""

    def __init__(self, embedding: Spike, settings: SpikeSettings) -> None:
        self.embedding = embedding
        self.threshold = settings.embed_threshold
        self.history, self.min_history = settings.history, settings.min_history
        self.baseline = Baseline(history=self.history, floor=FLOOR)
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> EmbeddingShare:
        return cls(parts.get(EmbedNormSpike), parts.settings(SpikeSettings))

    def reset(self) -> None:
        self.baseline.reset()
        self._odds = SortedWindow(self.history)
        self._above = 0  # consecutive accepted values that were too high
        self._since = 0  # step of the first of them

    # -- judging -----------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> list[Finding]:
        odds = _log_odds(obs.signals.get(EMBED_SHARE))
        if odds is None or not self._is_too_high(odds):
            return []
        is_harmful = self.embedding.is_raised(obs, AGREE)
        if self._above and not is_harmful:
            return []  # it has been noted
        centre, scale = self._odds.median(), self.baseline.scale
        return [
            self.make_finding(
                obs,
                Severity.REJECT if is_harmful else Severity.NOTE,
                signal=EMBED_SHARE,
                value=_share(odds),
                baseline=_share(centre),
                score=(odds - centre) / scale,
                threshold=NOTE_SHARE * self.threshold,
                onset=self._since if self._above else obs.step,
            )
        ]

    def _is_too_high(self, odds: float) -> bool:
        if self.baseline.count < self.min_history or odds <= _MOST_ODDS:
            return False
        return odds - self._odds.median() > NOTE_SHARE * self.threshold * self.baseline.scale

    def first_suspect_step(self) -> int | None:
        return self._since if self._above else None

    def safe_limits(self) -> dict[str, float]:
        """Return the limit of the share, which holds while the embedding's norm is not high."""
        if self._above or self.baseline.count < self.min_history:
            return {EMBED_SHARE: 1.0}
        limit = self._odds.median() + BELOW * NOTE_SHARE * self.threshold * self.baseline.scale
        return {EMBED_SHARE: _share(max(_MOST_ODDS, limit))}

    # -- learning ----------------------------------------------------------------------------------

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        odds = _log_odds(obs.signals.get(EMBED_SHARE))
        if odds is None:
            return
        if self._is_too_high(odds):
            if not self._above:
                self._since = obs.step
            self._above += 1
            if self._above < NEW_LEVEL:
                return
            self._odds.clear()
            self.baseline.recentre()
        self._above = 0
        self._odds.push(odds)
        self.baseline.learn(odds)

    def begin_level(self, obs: Observation) -> None:
        """Forget the level of the share and keep its scale."""
        odds = _log_odds(obs.signals.get(EMBED_SHARE))
        if odds is not None:
            self._odds.clear()
            self._odds.push(odds)
            self.baseline.recentre()
            self._above = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "odds": list(self._odds.arrivals),
            "above": self._above,
            "since": self._since,
            **self.baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)
        self._odds = SortedWindow(self.history, map(float, state["odds"]))
        self._above, self._since = int(state["above"]), int(state["since"])


def _log_odds(share: float | None) -> float | None:
    if share is None or not 0.0 <= share <= 1.0:  # NaN too
        return None
    share = min(max(share, EDGE), 1.0 - EDGE)
    return math.log(share / (1.0 - share))


def _share(odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-odds))


_MOST_ODDS = math.log(MOST / (1.0 - MOST))
