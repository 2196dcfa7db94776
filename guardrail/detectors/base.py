"""What a detector is: numbers in, findings out.

`observe` judges a step and changes nothing; `accept` learns from a step that was applied. Between
the two lies the verdict, so a rejected value can never enter the baseline that rejected it. Nothing
here reads a clock, draws a number or depends on a rank: equal observations give equal findings
everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from guardrail.core.records import Finding, Observation

# A rejected step in numbers: signal -> log(value / baseline) of its spikes.
LogJumps = Mapping[str, float]


class Detector(Protocol):
    @property
    def signals(self) -> tuple[str, ...]:
        """What it watches: of a step without any of them it has nothing to say and to learn. (): of
        every step.
        """

    def observe(self, obs: Observation) -> list[Finding]:
        """Findings about this step; leaves the detector as it was."""

    def accept(self, obs: Observation, left_out: Sequence[LogJumps] = ()) -> None:
        """Learn from a step whose update is applied.

        Args:
            left_out: in `advise`, the steps directly before it that would have been left out. They
                were applied all the same, so it shows whether they did harm; of what was really
                left out nobody knows.
        """

    def first_suspect_step(self) -> int | None:
        """First accepted step of a suspicion that has not gone away: states from it on are not
        called good yet.
        """

    def band(self) -> tuple[float, float] | None:
        """(baseline, threshold) in the signal's own units, or None while nothing is known."""

    def reset(self) -> None:
        """Forget everything, as after a restart with other data."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact: floats survive `repr`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, also one that was written under another window length."""
