"""The embedding takes over the gradient: its share of the squared norm runs away towards 1.

GLM-130B's spikes began in the embedding layer, whose gradients grew orders of magnitude over all
others. Under a global clip that also starves the rest: whatever the embedding takes of the norm,
the others lose.

The share lives between 0 and 1, so its distance is measured in log odds. The centre is the median
of the whole window, not of the last few values as for spikes: a share that runs away over fifty
steps would drag a quick centre along.

    note      the share is far above what it was, and more than half of all; once, until it is back or the new usual
    reject    and the embedding's own norm is near its limit: this update would move the embedding by far more than
              usual. A share that grew because the other gradients shrank does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records import EMBED_SHARE, Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps
from guardrail.detectors.baseline import Baseline, SortedWindow
from guardrail.detectors.spike import BELOW, NEW_LEVEL, NOTE_SHARE, Spike

# Least scale in log odds: with a score of 10 no rise by less than 7.4 times the odds counts, as for
# the norms.
FLOOR = 0.2
# Where a share counts as taking over.
MOST = 0.5
# Share of its own limit from which on the embedding's norm agrees. Two signals together need less
# than one alone.
AGREE = 0.8
# A share of exactly 0 or 1 has no log odds; 1 - 1e-9 is as near as it is worth telling apart.
EDGE = 1e-9


class EmbeddingShare:
    """Watches `embed_share`.

    Args:
        embedding: the spike detector of the embedding's norm, which says whether that norm stands
        out.
        score: robust sigmas of the log odds; from `NOTE_SHARE` of them on the share has run away.
        window, warmup: accepted steps in the baseline, and before it is trusted.
    """

    signals = (EMBED_SHARE,)

    def __init__(self, embedding: Spike, *, score: float, window: int, warmup: int) -> None:
        self.embedding = embedding
        self.score = score
        self.window = window
        self.warmup = warmup
        self.baseline = Baseline(window=window, floor=FLOOR)
        self.reset()

    def reset(self) -> None:
        self.baseline.reset()
        self._odds = SortedWindow(self.window)
        self._above = 0  # accepted values in a row that had run away
        self._since = 0  # step of the first of them

    def observe(self, obs: Observation) -> list[Finding]:
        odds = _log_odds(obs.signals.get(EMBED_SHARE))
        if odds is None or not self._away(odds):
            return []
        centre, scale = self._odds.median(), self.baseline.scale
        hurts = self.embedding.raised(obs, AGREE)
        if self._above and not hurts:
            return []  # it has been noted
        return [
            Finding(
                signal=EMBED_SHARE,
                step=obs.step,
                kind=FindingKind.EMBED_SPIKE,
                severity=Severity.REJECT if hurts else Severity.NOTE,
                value=_share(odds),
                baseline=_share(centre),
                score=(odds - centre) / scale,
                threshold=NOTE_SHARE * self.score,
                onset=self._since if self._above else obs.step,
            )
        ]

    def _away(self, odds: float) -> bool:
        if self.baseline.count < self.warmup or odds <= _MOST_ODDS:
            return False
        return odds - self._odds.median() > NOTE_SHARE * self.score * self.baseline.scale

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        odds = _log_odds(obs.signals.get(EMBED_SHARE))
        if odds is None:
            return
        if self._away(odds):
            self._since = self._since if self._above else obs.step
            self._above += 1
            if self._above < NEW_LEVEL:
                return
            self._odds.clear()
            self.baseline.recentre()
        self._above = 0
        self._odds.push(odds)
        self.baseline.learn(odds)

    def ceiling(self) -> float:
        """A share up to which nothing is said, as long as the embedding's norm does not stand
        out.
        """
        if self._above or self.baseline.count < self.warmup:
            return 1.0
        away = self._odds.median() + BELOW * NOTE_SHARE * self.score * self.baseline.scale
        return _share(max(_MOST_ODDS, away))

    def adopt(self, obs: Observation) -> None:
        """This share is the new level: forget the old one, keep the scale."""
        odds = _log_odds(obs.signals.get(EMBED_SHARE))
        if odds is not None:
            self._odds.clear()
            self._odds.push(odds)
            self.baseline.recentre()
            self._above = 0

    def first_suspect_step(self) -> int | None:
        return self._since if self._above else None

    def band(self) -> None:
        """The charts draw norms."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "odds": list(self._odds.arrivals),
            "above": self._above,
            "since": self._since,
            **self.baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)
        self._odds = SortedWindow(self.window, map(float, state["odds"]))
        self._above, self._since = int(state["above"]), int(state["since"])


def _log_odds(share: float | None) -> float | None:
    if share is None or not 0.0 <= share <= 1.0:  # NaN too
        return None
    share = min(max(share, EDGE), 1.0 - EDGE)
    return math.log(share / (1.0 - share))


def _share(odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-odds))


_MOST_ODDS = math.log(MOST / (1.0 - MOST))
