"""Loss and gradient norm are both high in consecutive steps.

One signal has noise with heavy tails, so a spike of it must be very high. Two signals that are high
in the same step, and again in the next one, are not noise. Batches with wrong labels, or with
foreign text, raise the loss by less than a spike in many consecutive batches. Each of them does
harm if it is applied.

So evidence is summed over consecutive steps, as in Page's (1954) cumulative sum. Each signal has
reached a share of its distance to the limit. A step counts by the sum of both shares minus `DRIFT`.
A step that counts 0 ends the row. Two steps with both signals at half of the distance are enough.
So are three with the loss at half and the norm at a quarter.

A row begins on a normal step. After a rejection, values decrease over several steps; in a log of a
run without a rollback, over hundreds. There both signals must be at half, twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardrail.core.records.findings import Finding, FindingKind, Observation, Severity
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.detectors.base import Detector, DetectorParts, LogJumps
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.spike import ONSET_SHARE, Spike
from guardrail.detectors.spike_settings import SpikeSettings
from guardrail.detectors.spikes import GradNormSpike, LossSpike, spike_keys

# Share of the way to its limit that each signal must have gone for a step to count: 1.6 and 2
# robust sigmas. Harder text raises the loss alone, and a norm alone is clipped.
RAISED = 0.2
# The same, while a row cannot begin.
SHARE = 0.5
# Sum of both shares that counts nothing.
DRIFT = 0.5
# Sum that a row must reach. On 34 recorded runs (317,250 records) 0.3 rejects nothing that 1.0 does
# not.
ENOUGH = 0.7
# Largest count of one step: one step is never enough, however high its values are.
MOST = 0.6
# A scale is a median absolute deviation of n values. Its relative standard error is 1.17 / sqrt(n)
# (Rousseeuw & Croux 1993: efficiency 37 %, so 0.71 / sqrt(0.37 n)). The numbers above hold for a
# history of `KNOWN` values. A scale of fewer values counts as larger by `DOUBT` of the additional
# standard errors. This detector rejects far below the limits. A scale that is too small by chance
# would be enough to reject.
STANDARD_ERROR = 1.17
KNOWN = 128
DOUBT = 2.0


class JointCusum(Detector):
    """Judges loss and gradient norm together.

    Args:
        first, second: the detectors of both.
    """

    name = "together"
    kind = FindingKind.LOSS_SPIKE  # each finding has the kind of its signal
    signals = (LOSS, GRAD_NORM)
    severities = (Severity.REJECT,)
    Settings = SpikeSettings
    keys = spike_keys("loss_threshold", "grad_threshold")
    judges_one_value = True
    needs_positive_loss = True
    title = "Loss and gradient norm together"
    help = """\
The detector `together` finds steps on which both signals are raised, but neither is a spike.
Wrong labels, or text from elsewhere, raise the loss by less than a spike in batch after batch.

- A step counts by the shares that both signals have of their limits: the sum of both shares, less
  0.5, at most 0.6.
- Both shares must exceed 0.2. That is 1.6 robust standard deviations for the loss and 2 for the
  norm.
- The evidence is summed over consecutive steps. **Limit:** a sum of 0.7.
- Two steps on which both are half-way are enough. So are three with the loss half-way and the
  norm at a quarter.
- One step alone is never enough.
- After a rejection both shares must exceed 0.5 until an ordinary step has followed.
- With fewer than 128 values in a baseline, its scale counts as larger.
- While an incident of known cause is open, one step with both signals raised is enough. If the
  state is the cause, both must have 0.4 of their limits.
- **Source:** cumulative sum of Page (1954); standard error of the scale by Rousseeuw & Croux
  1993.
- **Test:** `tests/unit/detectors/test_joint_cusum.py`."""

    def __init__(self, first: Spike, second: Spike) -> None:
        self.first, self.second = first, second
        self._first_least = RAISED * first.threshold
        self._second_least = RAISED * second.threshold
        self.reset()

    @classmethod
    def create(cls, parts: DetectorParts) -> JointCusum:
        return cls(parts.get(LossSpike), parts.get(GradNormSpike))

    def reset(self) -> None:
        self._is_unsettled = False  # a step was rejected, and no ordinary step has followed

    def begin_level(self, obs: Observation) -> None:
        """Let a row begin only after an ordinary step of the new level."""
        self._is_unsettled = True

    # -- judging -----------------------------------------------------------------------------------

    def observe(self, obs: Observation) -> list[Finding]:
        first, second = self.first.last, self.second.last  # every step comes here
        if (
            not first
            or not second
            or first[-1][1] <= self._first_least
            or second[-1][1] <= self._second_least
        ):
            return []
        least = SHARE if self._is_unsettled or obs.streak else RAISED
        now = self.evidence(obs, least)
        if not now:
            return []
        before, since = self._row(least)
        if since is None or now + before < ENOUGH:
            return []
        if _rejects(self.first, obs) or _rejects(self.second, obs):
            return []  # reported already, and with a higher score
        return self.findings(obs, to_spare=now + before - ENOUGH, onset=since)

    def evidence(self, obs: Observation, least: float = RAISED) -> float:
        """Return what a step counts for; 0: nothing, or the baselines are too young."""
        shares = self._shares(obs)
        return 0.0 if shares is None else _count(*shares, least)

    def is_high(self, obs: Observation, share: float) -> bool:
        """Return whether both signals have gone this share of the way to their limits."""
        shares = self._shares(obs)
        return shares is not None and min(shares) > share

    def _shares(self, obs: Observation) -> tuple[float, float] | None:
        """Return the share of the way to its limit that each has gone; None: not known well."""
        first, second = _known_distance(self.first, obs), _known_distance(self.second, obs)
        if first is None or second is None:
            return None
        return first[0] / first[1], second[0] / second[1]

    def findings(self, obs: Observation, *, to_spare: float, onset: int) -> list[Finding]:
        """Return the findings that reject this step: of the higher signal, or of both.

        Args:
            to_spare: by how much less one of the shares might have been for the same verdict.
        """
        shares = self._shares(obs)
        assert shares is not None
        found = []
        for spike, share in zip((self.first, self.second), shares, strict=True):
            distance = _distance(spike, obs)
            assert distance is not None
            jump, limit = distance
            if share <= ONSET_SHARE and share != max(shares):
                continue
            limit *= min(share, max(RAISED, share - to_spare))
            severity = Severity.REJECT
            found.append(
                spike.claim(obs, spike.kind, severity, jump=jump, limit=limit, onset=onset)
            )
        return found

    def _row(self, least: float) -> tuple[float, int | None]:
        """Return (evidence, first step) of the consecutive accepted steps that count, up to now."""
        others, total, since = dict(self.second.last), 0.0, None
        first_limit = self.first.threshold * _doubt(self.first.baseline)
        second_limit = self.second.threshold * _doubt(self.second.baseline)
        for step, score in reversed(self.first.last):
            counts = _count(score / first_limit, others.get(step, 0.0) / second_limit, least)
            if not counts:
                break
            total, since = total + counts, step
        return total, since

    # -- learning ----------------------------------------------------------------------------------

    def update(self, obs: Observation, skipped: Sequence[LogJumps] = ()) -> None:
        if skipped or obs.streak:
            self._is_unsettled = True
        if self._is_unsettled and (shares := self._shares(obs)) is not None:
            self._is_unsettled = sum(shares) > DRIFT

    def state_dict(self) -> dict[str, Any]:
        return {"unsettled": self._is_unsettled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._is_unsettled = bool(state.get("unsettled"))


def _count(first: float, second: float, least: float) -> float:
    if min(first, second) <= least:
        return 0.0
    return max(0.0, min(first + second - DRIFT, MOST))


def _rejects(spike: Spike, obs: Observation) -> bool:
    return any(finding.severity is Severity.REJECT for finding in spike.observe(obs))


def _known_distance(spike: Spike, obs: Observation) -> tuple[float, float] | None:
    """Return the same as `_distance`; None: the baseline has fewer than `min_history` values."""
    if spike.baseline.count < spike.min_history:
        return None
    return _distance(spike, obs)


def _distance(spike: Spike, obs: Observation) -> tuple[float, float] | None:
    """Return (log jump over the centre, log jump that is a limit here), as `Spike.distance`."""
    distance = spike.distance(obs)
    if distance is None:
        return None
    jump, limit = distance
    return jump, limit * _doubt(spike.baseline)


def _doubt(baseline: Baseline) -> float:
    """Return the factor, at least 1, by which the scale of a baseline may be too small.

    It compares the scale with one of `KNOWN` values.
    """
    values = min(max(baseline.count, 1), baseline.history)
    if values >= KNOWN:
        return 1.0
    return 1.0 + DOUBT * STANDARD_ERROR * (values**-0.5 - KNOWN**-0.5)
