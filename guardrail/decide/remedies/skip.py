"""skip: skip single updates before any other remedy."""

from guardrail.decide.remedies.base import EscalationRemedy


class SkipUpdate(EscalationRemedy):
    """Skips rejected updates one by one. Without it the first rejection causes a rollback."""

    action = "skip"
    help = "Skip the update and put its samples into the quarantine."
    keys = ()
    restores_state = False
