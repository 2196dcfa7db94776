"""A value far above what the signal has been: loss spikes, gradient spikes, spikes of the embedding
gradients.

The score is the distance of the logarithm from the baseline's centre in robust sigmas. Only
upwards: a loss that drops is no reason to leave an update out.

    first steps     Without a scale only a jump by `cold_factor` over the median so far counts. Losses double at step
                    2 in healthy runs that start without warm-up; three times the uniform loss ln V is beyond them.
    warm-up         The scale is known roughly: the threshold is widened by warmup / accepted steps.
    afterwards      `score` sigmas; from `NOTE_SHARE` of that on a step is worth a note and is applied.
    loss scale      Some programs log the norm of gradients that are still multiplied by the loss scale. A jump of such
                    a norm that the scale's own jump in the same step explains is another unit, and
                    no finding.
    heavy tails     Where harmless outliers are common, a jump must also exceed what they have shown (see tail.py), as
                    long as it stands alone. A second high value in a row meets the plain score again: that it
                    stays is what tells a spike from an outlier.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from guardrail.core.records import Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.benign_outliers import BenignOutliers
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.signed_loss import SignedLoss

# Accepted values from which on a scale means something.
COLD = 8
# A note from this share of the rejecting score on.
NOTE_SHARE = 0.6
# Accepted values from this share of the rejecting score on, right before a finding, belong to the
# same trouble.
ONSET_SHARE = 0.4
# Accepted values above the note line in a row that are a new level, not outliers; the last is noted
# as a level shift.
NEW_LEVEL = 8
# A ceiling lies this share of the way to the note, since exp and log do not undo one another in the
# last bit.
BELOW = 1.0 - 1e-9
# Steps over which an onset is looked for backwards.
LOOK_BACK = 16


class Spike:
    """Watches one signal.

    Args:
        signal: its name in `Observation.signals`; steps without it are passed over.
        kind: of the findings.
        score: robust sigmas above which a step is rejected.
        floor: least scale, in log units: `score * floor` is the smallest log jump that is ever
        rejected.
        cold_factor: jump over the median so far that is rejected while there is no scale.
        window, warmup: accepted steps in the scale, and before it is trusted.
        note_only: of a signal that is known only after the fact: leaving this update out would
        change nothing.
        loss_scale: knows the loss scale that the signal may be multiplied by; None: it is not.
        signed: of the loss, learns of the values that are not positive.
    """

    def __init__(
        self,
        signal: str,
        kind: FindingKind,
        *,
        score: float,
        floor: float,
        cold_factor: float,
        window: int,
        warmup: int,
        note_only: bool = False,
        loss_scale: ScaleCollapse | None = None,
        signed: SignedLoss | None = None,
    ) -> None:
        self.signal = signal
        self.kind = kind
        self.score = score
        self.warmup = warmup
        self.note_only = note_only
        self.loss_scale, self.signed = loss_scale, signed
        self.cold_jump = math.log(cold_factor)
        self.signals = (signal,)
        self.baseline = Baseline(window=window, floor=floor)
        self.tail = BenignOutliers()
        self.reset()

    def reset(self) -> None:
        self.baseline.reset()
        self.tail.reset()
        self._above = 0  # accepted values in a row above the note line
        # the jump of the last accepted value, if an outlier after ordinary ones
        self._alone: float | None = None
        # (step, score) of the last accepted ones
        self.last: deque[tuple[int, float]] = deque(maxlen=LOOK_BACK)
        self._plain: float  # log jump over the centre at which the next value is rejected
        self._note: float  # and from which on it is worth a note
        self._settle()

    def observe(self, obs: Observation) -> list[Finding]:
        value = obs.signals.get(self.signal)
        if value is None or not 0.0 < value < math.inf or self.baseline.empty:
            return []
        jump = math.log(value) - self.baseline.centre
        if jump <= self._note:
            return []
        jump -= self._explained(obs, jump)
        if jump <= self._note:
            return []
        plain = self._plain
        # An outlier is alone if an ordinary accepted step stands before it.
        limit = (
            plain if obs.streak or self._above else max(plain, self.tail.limit(self.baseline.count))
        )
        rejected = jump > limit and not self.note_only
        stays = self._above + 1 == NEW_LEVEL and not rejected
        kind = FindingKind.LEVEL_SHIFT if stays else self.kind
        severity = Severity.REJECT if rejected else Severity.NOTE
        return [
            self.claim(obs, kind, severity, jump=jump, limit=limit, onset=self._onset(obs.step))
        ]

    def claim(
        self,
        obs: Observation,
        kind: FindingKind,
        severity: Severity,
        *,
        jump: float,
        limit: float,
        onset: int,
    ) -> Finding:
        """A finding about the signal's value, against the baseline.

        Args:
            jump: of the logarithm over the centre.
            limit: the jump that it exceeds.
        """
        baseline = self.baseline
        return Finding(
            signal=self.signal,
            step=obs.step,
            kind=kind,
            severity=severity,
            value=obs.signals[self.signal],
            baseline=math.exp(baseline.centre),
            score=jump / baseline.scale,
            threshold=limit / baseline.scale,
            onset=onset,
        )

    def ceiling(self) -> float:
        """A value up to which nothing is said; 0 while nothing is known."""
        return 0.0 if self.baseline.empty else _exp(self.baseline.centre + BELOW * self._note)

    def adopt(self, obs: Observation) -> None:
        """This value is the new level: forget the old one, keep the scale."""
        self.baseline.recentre()
        self._above, self._alone = 0, None

    def distance(self, obs: Observation) -> tuple[float, float] | None:
        """(log jump over the centre, log jump that is rejected); None without a value or a
        baseline.
        """
        value = obs.signals.get(self.signal)
        if value is None or self.baseline.empty or not 0.0 < value < math.inf:
            return None
        jump = math.log(value) - self.baseline.centre
        return jump - self._explained(obs, jump), self._plain

    def _explained(self, obs: Observation, jump: float) -> float:
        """What part of a jump the loss scale explains: all but an ordinary rest, or nothing."""
        if self.loss_scale is None or -self._note <= jump <= self._note:
            return 0.0
        by = self.loss_scale.jump(obs)
        return by if by and abs(jump - by) <= self._note else 0.0

    def raised(self, obs: Observation, share: float) -> bool:
        """Whether the value exceeds this share of its limit."""
        distance = self.distance(obs)
        return distance is not None and distance[0] > share * distance[1]

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(self.signal)
        if value is None or not 0.0 < value < math.inf:
            if self.signed is not None:
                self.signed.reconsider(obs)
            return
        y = math.log(value)
        baseline = self.baseline
        if baseline.empty:
            baseline.learn(y)
            self._settle()
            return
        jump = y - baseline.centre
        note = self._note
        if not -note <= jump <= note:
            by = self._explained(obs, jump)
            if by:
                baseline.shift(by)
                jump -= by
        self.last.append((obs.step, jump / baseline.scale))
        high = jump > note and baseline.count >= self.warmup
        if high or left_out or self._alone is not None:
            self._learn_tail(obs, jump if high else None, left_out)
        if high:
            # An outlier that was let through must not raise the bar for the next one, a new level
            # must.
            self._above += 1
            if self._above < NEW_LEVEL:
                return
            baseline.recentre()
        self._above = 0
        baseline.learn(y)
        # as `_settle`, without the call: each signal of each step comes by here
        if baseline.count >= self.warmup:
            self._plain = plain = self.score * baseline.scale
            self._note = NOTE_SHARE * plain
        else:
            self._settle()

    def _settle(self) -> None:
        """The log jumps over the centre that the next value meets: rejected, and worth a note."""
        baseline = self.baseline
        self._plain = plain = (
            self.score * baseline.scale
            if baseline.count >= self.warmup
            else self._early(baseline.scale)
        )
        self._note = NOTE_SHARE * plain

    def _learn_tail(
        self, obs: Observation, outlier: float | None, left_out: Sequence[LogJumps]
    ) -> None:
        """An outlier that was applied, alone between two ordinary steps, was harmless.

        Args:
            outlier: the jump of the step being accepted if it is one, else None.
        """
        if outlier is not None:
            self._alone = None if obs.streak or self._above else outlier
            return
        before = [jumps[self.signal] for jumps in left_out if self.signal in jumps]
        if self._alone is not None:
            before.append(self._alone)
        unseen = obs.streak > len(left_out)  # something was really left out between
        if len(before) == 1 and not unseen and (self._alone is not None or not self._above):
            self.tail.learn(self.baseline.count, before[0])
        self._alone = None

    def _early(self, scale: float) -> float:
        """The log jump that is rejected before the scale is known well."""
        count = self.baseline.count
        return (
            self.cold_jump
            if count < COLD
            else min(self.cold_jump, self.score * scale * self.warmup / count)
        )

    def _onset(self, step: int) -> int:
        """First step of the unbroken run of high accepted values that leads here."""
        for earlier, score in reversed(self.last):
            if score < ONSET_SHARE * self.score:
                break
            step = earlier
        return step

    def first_suspect_step(self) -> int | None:
        if not self.last or self.last[-1][1] < ONSET_SHARE * self.score:
            return None
        return self._onset(self.last[-1][0])

    def band(self) -> tuple[float, float] | None:
        if self.baseline.empty:
            return None
        centre = self.baseline.centre
        limit = self._plain
        if not self._above:
            limit = max(limit, self.tail.limit(self.baseline.count))
        return math.exp(centre), _exp(centre + limit)

    def state_dict(self) -> dict[str, Any]:
        return {
            "above": self._above,
            "alone": self._alone,
            "last": [list(pair) for pair in self.last],
            "tail": self.tail.state_dict(),
            **self.baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)
        self.tail.load_state_dict(state["tail"])
        self._above = int(state["above"])
        self._alone = None if state["alone"] is None else float(state["alone"])
        self.last = deque(
            ((int(step), float(score)) for step, score in state["last"]), maxlen=LOOK_BACK
        )
        self._settle()


def _exp(x: float) -> float:
    """A threshold beyond the largest double is no threshold."""
    return math.exp(x) if x < 709.0 else math.inf
