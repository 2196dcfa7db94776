"""A value far above the history of its signal: spikes of loss, gradients, embedding gradients.

The score is the distance of the logarithm from the centre of the baseline, in robust sigmas. Only a
rise counts: a loss that drops is no reason to skip an update.

first steps     Without a scale, only a jump by `cold_factor` over the median so far counts. Losses
                double at step 2 in healthy runs that start without warm-up. Three times the uniform
                loss ln V is beyond them.
young runs      The scale is known roughly, so the limit is widened by min_history / accepted steps.
afterwards      The limit is `threshold` sigmas. From `NOTE_SHARE` of it on, a step is noted and
                applied.
loss scale      Some programs log the norm of gradients that are still multiplied by the loss scale.
                A jump of the scale in the same step may explain the jump of the norm. That is a
                change of the unit, and not a finding.
heavy tails     Where harmless outliers are common, a single jump must also exceed their limit (see
                benign_outliers.py). For a second consecutive high value, the plain limit holds
                again: an outlier ends in the next step, a spike stays.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import Detector, LogJumps
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.benign_outliers import BenignOutliers
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.signed_loss import SignedLoss
from guardrail.detectors.spike_settings import SpikeSettings

# Accepted values that a scale needs.
COLD = 8
# A note from this share of the rejecting threshold on.
NOTE_SHARE = 0.6
# Accepted values from this share of the rejecting threshold on, directly before a finding, belong
# to the same anomaly.
ONSET_SHARE = 0.4
# Consecutive accepted values above the note line that are a new level, not outliers. The last one
# is noted as a level shift.
NEW_LEVEL = 8
# A safe limit is at this share of the distance to a note, since exp(log(x)) differs from x in the
# last bit.
BELOW = 1.0 - 1e-9
# Steps over which an onset is searched backwards.
LOOK_BACK = 16


class Spike(Detector):
    """Judges one signal. Base of the detectors in spikes.py.

    Attributes:
        signal: its name in `Observation.signals`.
        floor: smallest scale, in log units: `threshold * floor` is the smallest log jump that is
            ever rejected.
        cold_factor: factor over the median so far that is rejected while there is no scale.
        is_note_only: of a signal that is known only after the update: skipping would change
        nothing.
        last: (step, score) of the last accepted values.

    Args:
        settings: the history that the scale covers, and the steps before it is trusted.
        threshold: robust sigmas above which a step is rejected.
        loss_scale: knows the loss scale that the signal may be multiplied by; None: there is none.
        signed: of the loss, learns from the values that are not positive.
    """

    Settings = SpikeSettings
    severities: ClassVar[tuple[Severity, ...]] = (Severity.NOTE, Severity.REJECT)
    judges_one_value = True
    title = "Spikes"
    help = """\
The detectors `loss`, `grad_norm`, `embed_grad_norm` and `update_norm` work alike.

| phase | limit |
|---|---|
| fewer than 8 accepted steps | a factor over the median so far: 3 for the loss, 100 for a norm |
| up to `min_history` | the threshold times `min_history` / accepted steps, at most the factor above |
| afterwards | the threshold; from 0.6 of it the step is a note and is applied |

- The smallest rejected jump of the loss is 8 % (8 x 0.01 in logarithms).
- The smallest rejected jump of a gradient norm is 7.4-fold (10 x 0.2 in logarithms).
- An update norm is only noted, since it is known after the update. A note needs a rise of at
  least 22 %.
- Eight consecutive accepted values above the note line are a new level. The last one is noted as
  a level shift.
- The onset is the first of the consecutive steps, up to 16 back, that had 0.4 of the limit or
  more.
- A jump of a norm that the loss scale's own jump in the same step explains is no finding.
- **Heavy tails.** Some losses have harmless outliers. An outlier that was back after one step
  teaches the detector. A single jump must then also exceed what such outliers reach once in 6,700
  steps. It needs at least 8 outliers and remembers 24. A second consecutive high value meets the
  plain limit again.
- **Source:** median absolute deviation (Hampel 1974); tail estimate by Hill (1975); peaks over
  threshold as in Siffer et al. 2017.
- **Tests:** `tests/unit/detectors/test_spike.py`, `tests/unit/detectors/test_benign_outliers.py`."""

    signal: str
    floor: float
    cold_factor: float
    is_note_only: ClassVar[bool] = False

    def __init__(
        self,
        settings: SpikeSettings,
        *,
        threshold: float,
        loss_scale: ScaleCollapse | None = None,
        signed: SignedLoss | None = None,
    ) -> None:
        self.threshold = threshold
        self.min_history = settings.min_history
        self.loss_scale, self.signed = loss_scale, signed
        self.cold_jump = math.log(self.cold_factor)
        self.baseline = Baseline(history=settings.history, floor=self.floor)
        self.outliers = BenignOutliers()
        self.reset()

    def reset(self) -> None:
        self.baseline.reset()
        self.outliers.reset()
        self._above = 0  # consecutive accepted values above the note line
        # the jump of the last accepted value, if it is an outlier after ordinary ones
        self._alone: float | None = None
        self.last: deque[tuple[int, float]] = deque(maxlen=LOOK_BACK)
        self._plain: float  # log jump over the centre at which the next value is rejected
        self._note: float  # log jump from which on it is noted
        self._compute_limits()

    # -- judging -----------------------------------------------------------------------------------

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
        limit = self._plain
        if not obs.streak and not self._above:
            # An outlier is alone if the step before it is normal and accepted.
            limit = max(limit, self.outliers.limit(self.baseline.count))
        is_rejected = jump > limit and not self.is_note_only
        severity = Severity.REJECT if is_rejected else Severity.NOTE
        kind = self.kind
        if not is_rejected and self._above + 1 == NEW_LEVEL:
            kind = FindingKind.LEVEL_SHIFT
        onset = self._onset(obs.step)
        return [self.claim(obs, kind, severity, jump=jump, limit=limit, onset=onset)]

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
        """Return a finding about this signal; jump and limit are logarithms over the centre."""
        baseline = self.baseline
        return self.make_finding(
            obs,
            severity,
            signal=self.signal,
            kind=kind,
            value=obs.signals[self.signal],
            baseline=math.exp(baseline.centre),
            score=jump / baseline.scale,
            threshold=limit / baseline.scale,
            onset=onset,
        )

    def distance(self, obs: Observation) -> tuple[float, float] | None:
        """Return (log jump over the centre, log jump that is rejected).

        None: there is no value, or no baseline yet.
        """
        value = obs.signals.get(self.signal)
        if value is None or self.baseline.empty or not 0.0 < value < math.inf:
            return None
        jump = math.log(value) - self.baseline.centre
        return jump - self._explained(obs, jump), self._plain

    def is_raised(self, obs: Observation, share: float) -> bool:
        """Return whether the value exceeds this share of its limit."""
        distance = self.distance(obs)
        return distance is not None and distance[0] > share * distance[1]

    def _explained(self, obs: Observation, jump: float) -> float:
        """Return the part of a jump that the loss scale explains: all but a usual rest, or 0."""
        if self.loss_scale is None or -self._note <= jump <= self._note:
            return 0.0
        by = self.loss_scale.jump(obs)
        if by and abs(jump - by) <= self._note:
            return by
        return 0.0

    def _onset(self, step: int) -> int:
        """Return the first of the consecutive high accepted values directly before a step."""
        for earlier, score in reversed(self.last):
            if score < ONSET_SHARE * self.threshold:
                break
            step = earlier
        return step

    def first_suspect_step(self) -> int | None:
        if not self.last or self.last[-1][1] < ONSET_SHARE * self.threshold:
            return None
        return self._onset(self.last[-1][0])

    def band(self) -> tuple[float, float] | None:
        if self.baseline.empty:
            return None
        centre = self.baseline.centre
        limit = self._plain
        if not self._above:
            limit = max(limit, self.outliers.limit(self.baseline.count))
        return math.exp(centre), _exp(centre + limit)

    def safe_limits(self) -> dict[str, float]:
        if self.baseline.empty:
            return {self.signal: 0.0}
        return {self.signal: _exp(self.baseline.centre + BELOW * self._note)}

    # -- learning ----------------------------------------------------------------------------------

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(self.signal)
        if value is None or not 0.0 < value < math.inf:
            if self.signed is not None:
                self.signed.learn_unexpected(obs)
            return
        y = math.log(value)
        baseline = self.baseline
        if baseline.empty:
            baseline.learn(y)
            self._compute_limits()
            return
        jump = y - baseline.centre
        note = self._note
        if not -note <= jump <= note:
            by = self._explained(obs, jump)
            if by:
                baseline.shift(by)
                jump -= by
        self.last.append((obs.step, jump / baseline.scale))
        is_high = jump > note and baseline.count >= self.min_history
        if is_high:
            self._learn_high(obs, jump)
            # An outlier that was applied must not raise the limit of the next one. A new level
            # must.
            self._above += 1
            if self._above < NEW_LEVEL:
                return
            baseline.recentre()
        elif skipped or self._alone is not None:
            self._learn_outlier(obs, skipped)
        self._above = 0
        baseline.learn(y)
        # As `_compute_limits`, without the call: each signal of each step comes here.
        if baseline.count >= self.min_history:
            self._plain = plain = self.threshold * baseline.scale
            self._note = NOTE_SHARE * plain
        else:
            self._compute_limits()

    def _compute_limits(self) -> None:
        """Compute the log jumps over the centre at which the next value is rejected or noted."""
        self._plain = plain = self._plain_limit()
        self._note = NOTE_SHARE * plain

    def _plain_limit(self) -> float:
        count = self.baseline.count
        limit = self.threshold * self.baseline.scale
        if count >= self.min_history:
            return limit
        if count < COLD:
            return self.cold_jump
        return min(self.cold_jump, limit * self.min_history / count)

    def _learn_high(self, obs: Observation, jump: float) -> None:
        """Record an outlier that is being applied, if the steps before it are normal."""
        self._alone = None
        if not obs.streak and not self._above:
            self._alone = jump

    def _learn_outlier(self, obs: Observation, skipped: Sequence[LogJumps]) -> None:
        """Learn from an ordinary step: one applied outlier directly before it was harmless."""
        before = [jumps[self.signal] for jumps in skipped if self.signal in jumps]
        if self._alone is not None:
            before.append(self._alone)
        is_unseen = obs.streak > len(skipped)  # something was really skipped between
        if len(before) == 1 and not is_unseen and (self._alone is not None or not self._above):
            self.outliers.learn(self.baseline.count, before[0])
        self._alone = None

    # -- state -------------------------------------------------------------------------------------

    def begin_level(self, obs: Observation) -> None:
        """Forget the level of the signal and keep its scale."""
        self.baseline.recentre()
        self._above, self._alone = 0, None

    def state_dict(self) -> dict[str, Any]:
        return {
            "above": self._above,
            "alone": self._alone,
            "last": [list(pair) for pair in self.last],
            "tail": self.outliers.state_dict(),
            **self.baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)
        self.outliers.load_state_dict(state["tail"])
        alone = state["alone"]
        self._above = int(state["above"])
        self._alone = None if alone is None else float(alone)
        self.last = deque(
            ((int(step), float(score)) for step, score in state["last"]), maxlen=LOOK_BACK
        )
        self._compute_limits()


def _exp(x: float) -> float:
    """Return e^x; inf for a limit beyond the largest double."""
    return math.exp(x) if x < 709.0 else math.inf
