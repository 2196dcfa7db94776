"""reset_moments: the optimizer's moments at zero, and a low learning rate."""

from __future__ import annotations

from guardrail.core.records.verdicts import Remedy
from guardrail.decide.remedies.base import EscalationRemedy
from guardrail.decide.remedies.lower_lr import LowerLr


class ResetMoments(EscalationRemedy):
    """Restores, sets the moments to zero once, and multiplies the learning rate by a factor.

    Without moments Adam's first steps are of full size, so the rate is low as well.
    """

    action = "reset_moments"
    help = "Set the optimizer moments to zero, and use a low learning rate that returns."
    keys = ("factor", "hold_steps", "ramp_steps", "max_uses", "cooldown")
    effect = "moments"

    def effects(self, from_step: int) -> tuple[Remedy, ...]:
        low_lr = LowerLr(self.entry, uses=self.uses).effects(from_step)
        return (Remedy(kind=self.effect, value=1.0, from_step=from_step), *low_lr)

    @classmethod
    def factor_at(cls, effect: Remedy, step: int) -> float:
        """Return 1.0: it is no factor. See `guardrail.decide.remedies.effects.resets_moments`."""
        return 1.0

    @classmethod
    def sentence(cls, effect: Remedy) -> str:
        return f"the optimizer's moments at zero before step {effect.from_step}"

    @classmethod
    def report_line(cls, effect: Remedy) -> str:
        return f"optimizer moments reset before step {effect.from_step:,}"

    @classmethod
    def short_line(cls, effect: Remedy) -> str:
        return "moments reset"
