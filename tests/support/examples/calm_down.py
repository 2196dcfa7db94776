"""An example of a remedy in one file: a lower learning rate and a lower clipping norm together.

To use it, copy the file to `guardrail/decide/remedies/` and add `CalmDown` to `REMEDIES` in
`guardrail/decide/remedies/registry.py`. An entry of [[guard.escalation]] then has
`action = "calm_down"`.
"""

from __future__ import annotations

from guardrail.core.records.verdicts import Remedy
from guardrail.decide.remedies.base import EscalationRemedy
from guardrail.decide.remedies.lower_lr import LowerLr
from guardrail.decide.remedies.tighten_clip import TightenClip


class CalmDown(EscalationRemedy):
    """Restores, and multiplies learning rate and clipping norm by the same factor."""

    action = "calm_down"
    help = "Multiply learning rate and clipping norm by `factor`."
    keys = ("factor", "hold_steps", "ramp_steps", "max_uses", "cooldown")

    def effects(self, from_step: int) -> tuple[Remedy, ...]:
        lower_lr = LowerLr(self.entry, uses=self.uses)
        tighten_clip = TightenClip(self.entry, uses=self.uses)
        return (*lower_lr.effects(from_step), *tighten_clip.effects(from_step))
