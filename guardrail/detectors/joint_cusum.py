"""Loss and gradient norm stand high together, step after step: surer than either alone, or once.

A spike of one signal must stand far out, since the noise of one signal has heavy tails. That both
are high in the same step, and in the next one again, is not noise. Batches whose labels are wrong,
or whose text is from elsewhere, raise the loss by less than a spike, batch after batch, and each
that is applied does its harm.

So evidence is summed over an unbroken row of steps, as in Page's (1954) cumulative sum. A step
counts by how far both have gone of the way to their limits, both shares added, less `DRIFT`; one
that counts nothing ends the row. Two steps on which both are half-way are enough, or three on which
the loss is half-way and the norm a quarter.

A row begins on an ordinary step. Behind a rejection values come down over several steps, and in a
log of a run that nobody took back over hundreds: there both must be half-way, twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardrail.core.records import Finding, Observation, Severity
from guardrail.detectors.base import LogJumps
from guardrail.detectors.baseline import Baseline
from guardrail.detectors.spike import ONSET_SHARE, Spike

# Of the way to its limit that each signal must have gone for a step to count: 1.6 and 2 robust
# sigmas. Harder text raises the loss alone, and a norm alone is clipped.
RAISED = 0.2
# The same, while a row cannot begin.
SHARE = 0.5
# Both shares together that are nobody's business.
DRIFT = 0.5
# What a row must sum up to. On 34 recorded runs (317,250 records) 0.3 rejects nothing that 1.0 does
# not.
ENOUGH = 0.7
# What one step counts for at most: what stood out once is never enough, however far.
MOST = 0.6
# A scale is a median absolute deviation of n values; its relative standard error is 1.17 / sqrt(n)
# (Rousseeuw & Croux 1993: efficiency 37 %, so 0.71 / sqrt(0.37 n)). The numbers above hold for a
# window of `KNOWN` values. A scale of fewer values counts as larger by `DOUBT` of the additional
# standard errors, since this claim is made far below the limits, where a scale that came out too
# small by chance is enough to make it.
STANDARD_ERROR = 1.17
KNOWN = 128
DOUBT = 2.0


class JointCusum:
    """Watches two signals.

    Args:
        first, second: the detectors of both.
    """

    def __init__(self, first: Spike, second: Spike) -> None:
        self.first, self.second = first, second
        self.signals = (first.signal, second.signal)
        self._first_least, self._second_least = RAISED * first.score, RAISED * second.score
        self.reset()

    def reset(self) -> None:
        self._unsettled = False  # something was rejected, and no ordinary step has followed

    def adopt(self, obs: Observation) -> None:
        """Both stand on a new level; there a row begins behind an ordinary step."""
        self._unsettled = True

    def observe(self, obs: Observation) -> list[Finding]:
        first, second = self.first.last, self.second.last  # every step comes by here
        if (
            not first
            or not second
            or first[-1][1] <= self._first_least
            or second[-1][1] <= self._second_least
        ):
            return []
        least = SHARE if self._unsettled or obs.streak else RAISED
        now = self.counts(obs, least)
        if not now:
            return []
        before, since = self._row(least)
        if since is None or now + before < ENOUGH:
            return []
        if any(
            f.severity is Severity.REJECT
            for spike in (self.first, self.second)
            for f in spike.observe(obs)
        ):
            return []  # said already, and by more
        return self.findings(obs, to_spare=now + before - ENOUGH, onset=since)

    def counts(self, obs: Observation, least: float = RAISED) -> float:
        """What a step counts for; 0: nothing, or it cannot be said yet."""
        shares = self._shares(obs)
        return _counts(*shares, least) if shares is not None else 0.0

    def high(self, obs: Observation, share: float) -> bool:
        """Whether both have gone this share of the way to their limits."""
        shares = self._shares(obs)
        return shares is not None and min(shares) > share

    def _shares(self, obs: Observation) -> tuple[float, float] | None:
        """Of the way to the limit that each has gone; None while that is not known well."""
        spikes = (self.first, self.second)
        distances = [
            _distance(spike, obs) for spike in spikes if spike.baseline.count >= spike.warmup
        ]
        if len(distances) < 2 or None in distances:
            return None
        first, second = (jump / limit for jump, limit in filter(None, distances))
        return first, second

    def findings(self, obs: Observation, *, to_spare: float, onset: int) -> list[Finding]:
        """The claim that this update is not to be applied, by what stands out most, or both.

        Args:
            to_spare: by how much less one of the shares might have been for the same claim.
        """
        shares = self._shares(obs)
        assert shares is not None
        found = []
        for spike, share in zip((self.first, self.second), shares, strict=True):
            distance = _distance(spike, obs)
            assert distance is not None
            jump, limit = distance
            if share > ONSET_SHARE or share == max(shares):
                limit *= min(share, max(RAISED, share - to_spare))
                found.append(
                    spike.claim(
                        obs, spike.kind, Severity.REJECT, jump=jump, limit=limit, onset=onset
                    )
                )
        return found

    def _row(self, least: float) -> tuple[float, int | None]:
        """(What they count for, first) of the accepted steps, one directly behind the other up to
        now, that count.
        """
        others, total, since = dict(self.second.last), 0.0, None
        first_limit = self.first.score * _doubt(self.first.baseline)
        second_limit = self.second.score * _doubt(self.second.baseline)
        for step, score in reversed(self.first.last):
            counts = _counts(score / first_limit, others.get(step, 0.0) / second_limit, least)
            if not counts:
                break
            total, since = total + counts, step
        return total, since

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        if left_out or obs.streak:
            self._unsettled = True
        if self._unsettled and (shares := self._shares(obs)) is not None:
            self._unsettled = sum(shares) > DRIFT

    def first_suspect_step(self) -> int | None:
        """What stands so high is suspected by the loss's own detector."""
        return None

    def band(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"unsettled": self._unsettled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unsettled = bool(state.get("unsettled"))


def _counts(first: float, second: float, least: float) -> float:
    return max(0.0, min(first + second - DRIFT, MOST)) if min(first, second) > least else 0.0


def _distance(spike: Spike, obs: Observation) -> tuple[float, float] | None:
    """(log jump over the centre, log jump that is a limit here), as `Spike.distance`."""
    distance = spike.distance(obs)
    if distance is None:
        return None
    jump, limit = distance
    return jump, limit * _doubt(spike.baseline)


def _doubt(baseline: Baseline) -> float:
    """By what factor the scale of a baseline may be too small, as against one of `KNOWN` values; at
    least 1.
    """
    values = min(max(baseline.count, 1), baseline.window)
    if values >= KNOWN:
        return 1.0
    return 1.0 + DOUBT * STANDARD_ERROR * (values**-0.5 - KNOWN**-0.5)
