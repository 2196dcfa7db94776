"""rollback: restore the last good state and skip the window."""

from guardrail.decide.remedies.base import EscalationRemedy


class PlainRollback(EscalationRemedy):
    """Restores a state from before the onset and skips the data from the onset on."""

    action = "rollback"
    help = "Restore a state from before the onset. Skip the window from the onset to the last bad batch."
    skips_data = True
