"""Loss and gradient norm stand high together, twice in a row: surer than either alone, or once.

A spike of one signal must stand far out, since the noise of one signal has heavy tails. That both jump in the same
step, and in the next one again, is not noise: half the way to each one's limit is enough then. Batches whose labels are
wrong, or whose text is from elsewhere, raise the loss by less than a spike, batch after batch, and each that is applied
does its harm.

It has no memory of its own: the detectors of the two signals know how far out the last accepted values stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardrail.detectors.base import Jumps
from guardrail.detectors.spike import Spike
from guardrail.records import Finding, Observation, Severity

# Of the way to its limit that each signal must have gone.
SHARE = 0.5


class Together:
    """Watches two signals.

    Args:
        first, second: the detectors of both.
    """

    def __init__(self, first: Spike, second: Spike) -> None:
        self.first, self.second = first, second
        self.signals = (first.signal, second.signal)

    def observe(self, obs: Observation) -> list[Finding]:
        last = self.first.last  # every step comes by here
        if not last or last[-1][1] <= SHARE * self.first.score or not self.high(obs):
            return []
        since = self._since()
        if since is None:
            return []
        if any(f.severity is Severity.REJECT for spike in (self.first, self.second) for f in spike.observe(obs)):
            return []  # said already, and by more
        return self.findings(obs, onset=since)

    def high(self, obs: Observation, share: float = SHARE) -> bool:
        """Whether both have gone this share of the way to their limits."""
        spikes = (self.first, self.second)
        return all(spike.baseline.count >= spike.warmup and spike.raised(obs, share) for spike in spikes)

    def findings(self, obs: Observation, *, share: float = SHARE, onset: int | None = None) -> list[Finding]:
        """The claim that this update is not to be applied, for each signal; they stand `high`."""
        found = []
        for spike in (self.first, self.second):
            distance = spike.distance(obs)
            assert distance is not None
            jump, limit = distance
            since = obs.step if onset is None else onset
            found.append(spike.claim(obs, spike.kind, Severity.REJECT, jump=jump, limit=share * limit, onset=since))
        return found

    def _since(self) -> int | None:
        """First of the accepted steps, one directly behind the other up to now, at which both stood high."""
        others, since = dict(self.second.last), None
        for step, score in reversed(self.first.last):
            if score <= SHARE * self.first.score or others.get(step, 0.0) <= SHARE * self.second.score:
                break
            since = step
        return since

    def accept(self, obs: Observation, left_out: Sequence[Jumps] = ()) -> None:
        pass

    def reset(self) -> None:
        pass

    def suspect_from(self) -> int | None:
        """What stands so high is suspected by the loss's own detector."""
        return None

    def band(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
