"""widen: skip a longer window."""

from __future__ import annotations

from guardrail.core.records.verdicts import Cause
from guardrail.decide.remedies.base import EscalationRemedy


class WidenWindow(EscalationRemedy):
    """Skips a window twice as long as that of a plain rollback, then four times, eight times."""

    action = "widen"
    help = "The same with a window twice as long, then four times, up to `guard.max_window`."
    skips_data = True
    widens_window = True

    @classmethod
    def fits(cls, cause: Cause | None, *, embedding_leads: bool) -> bool:
        return cause is not Cause.STATE  # no batch is the cause, so no data is skipped

    def window_factor(self) -> int:
        return int(2 ** (1 + self.uses))
