"""The last steps whose updates were applied: their batches and losses. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from msgspec import structs

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Observation
from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import LossTrend
from guardrail.decide.recovery import LEAST, MOST, fit_trend
from guardrail.decide.remedies.registry import BY_ACTION
from guardrail.decide.rollback_window import Applied
from guardrail.detectors.divergence import Divergence
from guardrail.detectors.growth import CLIMB
from guardrail.detectors.spike import LOOK_BACK


class AppliedSteps:
    """The last applied steps, oldest first.

    Attributes:
        batches: of all applied steps, as far back as a rollback can reach.
        losses: (step, loss) of the accepted steps.
        other_losses: (step, loss) of steps that were applied and not accepted: a detector objected,
            the mode was off, or the loss is signed.
    """

    def __init__(self, options: GuardOptions) -> None:
        self.batches: deque[Applied] = deque(maxlen=_find_reach(options))
        self.losses: deque[tuple[int, float]] = deque(maxlen=2 * MOST)
        self.other_losses: deque[tuple[int, float]] = deque(maxlen=LEAST)

    @property
    def last_step(self) -> int:
        """Return the number of the last applied step; 0: there is none."""
        return self.batches[-1].step if self.batches else 0

    @property
    def end(self) -> int:
        """Return the position after the last applied batch."""
        return self.batches[-1].last if self.batches else 0

    def add(self, obs: Observation, *, is_accepted: bool) -> None:
        """Add an applied step: its batch, and its loss if that is a number.

        Args:
            is_accepted: no detector objected, and the loss is positive.
        """
        self.batches.append(Applied(obs.step, obs.first, obs.last))
        loss = obs.signals.get(LOSS)
        if loss is not None and math.isfinite(loss):
            losses = self.losses if is_accepted else self.other_losses
            losses.append((obs.step, loss))

    def add_other_loss(self, obs: Observation) -> None:
        """Add the loss of a step that was not accepted but is applied."""
        loss = obs.signals.get(LOSS)
        if loss is not None and math.isfinite(loss):
            self.other_losses.append((obs.step, loss))

    def newest_losses(self, since: int) -> list[float]:
        """Return the newest losses from a step on, accepted or not."""
        pairs = sorted(pair for pair in (*self.losses, *self.other_losses) if pair[0] >= since)
        return [loss for _, loss in pairs[-LEAST:]]

    def fit_trend_before(self, step: int) -> LossTrend | None:
        """Return the trend of the accepted losses before a step; None: there are too few."""
        return fit_trend([pair for pair in self.losses if pair[0] < step])

    def forget_all(self) -> None:
        """Forget everything but the losses that were not accepted."""
        self.batches.clear()
        self.losses.clear()

    def forget_from(self, step: int) -> None:
        """Forget the accepted steps from this one on."""
        while self.losses and self.losses[-1][0] >= step:
            self.losses.pop()
        while self.batches and self.batches[-1].step >= step:
            self.batches.pop()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "history": [list(structs.astuple(batch)) for batch in self.batches],
            "losses": [list(pair) for pair in self.losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state. A state of an older version has no losses."""
        self.forget_all()
        self.other_losses.clear()
        self.batches.extend(Applied(*batch) for batch in state["history"])
        self.losses.extend((int(step), float(loss)) for step, loss in state.get("losses", ()))


def _find_reach(options: GuardOptions) -> int:
    """Return how many batches a rollback can go back.

    That is to the earliest onset that a detector can name, and `skip_before` batches further.
    """
    rise = Divergence.MEMORY * options.detectors.divergence.steps
    reach = options.skip_before + max(LOOK_BACK, rise, CLIMB) + 1
    if any(BY_ACTION[entry.action].widens_window for entry in options.escalation):
        reach += options.max_window // 2
    return reach
