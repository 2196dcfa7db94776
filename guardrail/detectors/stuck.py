"""The very same number again and again: a loss that is cached, a norm that nobody computes any
more, a frozen batch.

Some logs repeat numbers by nature: printed with two digits, logged every tenth step and filled in
between. So a run's own history decides. `usual` is the share of values that equalled the one
before; with it, `n` repeats in a row happen by chance at `usual ** n`, and once that is below
`CHANCE` it is no chance.

A note, once for a stretch and again each time it has doubled: the numbers say nothing about the
weights, good or bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guardrail.core.records import Finding, FindingKind, Observation, Severity
from guardrail.detectors.base import LogJumps

# Chance of a stretch that still counts as chance: once in a hundred thousand runs of a million
# steps each would be 1e-11; a few digits of a quiet signal repeat more than independent draws
# would, and this leaves room for that.
CHANCE = 1e-12
# Repeats that are never reported, whatever the history: one value in 10 steps of accumulation
# logged at each of them.
LEAST = 8
# Values outside stretches of their own before a history says anything.
KNOWN = 32


class Stuck:
    """Watches one signal."""

    def __init__(self, signal: str) -> None:
        self.signal = signal
        self.signals = (signal,)
        self.reset()

    def reset(self) -> None:
        self._value = math.nan
        self._repeats = 0  # values that equalled it since
        self._tell_at = math.inf  # repeats at which the next note falls due
        self._values = self._equal = 0  # of all stretches before the present one

    def observe(self, obs: Observation) -> list[Finding]:
        if obs.signals.get(self.signal) != self._value or self._repeats + 1 < self._tell_at:
            return []
        return [
            Finding(
                signal=self.signal,
                step=obs.step,
                kind=FindingKind.STUCK,
                severity=Severity.NOTE,
                value=self._value,
                baseline=self._value,
                score=float(self._repeats + 1),
                threshold=self._tell_at,
                onset=obs.step,  # nothing points at the weights: no state becomes suspect for it
            )
        ]

    @property
    def due(self) -> bool:
        """Whether one more of the same number would be told."""
        return self._repeats + 1 >= self._tell_at

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        value = obs.signals.get(self.signal)
        if value is None or not -math.inf < value < math.inf:
            return
        if value == self._value:
            self._repeats += 1
            if self._repeats == 1:
                self._tell_at = self._first()
            elif self._repeats >= self._tell_at:
                self._tell_at *= 2
            return
        if self._value == self._value:  # there was one before: NaN equals nothing
            self._values += 1 + self._repeats
            self._equal += self._repeats
        self._value, self._repeats = value, 0
        self._tell_at = math.inf

    def _first(self) -> float:
        """Repeats of the present stretch that are no chance any more."""
        if self._values < KNOWN:
            return math.inf
        # One repeat more than were seen: a run that never repeated may still do it once.
        usual = (self._equal + 1) / (self._values + 1)
        return (
            max(LEAST, math.ceil(math.log(CHANCE) / math.log(usual))) if usual < 1.0 else math.inf
        )

    def first_suspect_step(self) -> None:
        return None

    def band(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "value": None if math.isnan(self._value) else self._value,
            "repeats": self._repeats,
            "tell_at": None if math.isinf(self._tell_at) else self._tell_at,
            "values": self._values,
            "equal": self._equal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._value = math.nan if state["value"] is None else float(state["value"])
        self._repeats = int(state["repeats"])
        self._tell_at = math.inf if state["tell_at"] is None else state["tell_at"]
        self._values, self._equal = int(state["values"]), int(state["equal"])
