"""older: restore an older state."""

from guardrail.decide.remedies.base import EscalationRemedy


class OlderState(EscalationRemedy):
    """Restores a state that is at least `steps` steps older than that of a plain rollback."""

    action = "older"
    help = "The same from a state that is at least `steps` steps older."
    keys = ("steps", "max_uses", "cooldown")
    skips_data = True
    restores_older_state = True

    def move_target(self, before_step: int) -> int:
        return max(1, before_step - self.entry.steps)
