"""pause: pause and ask the user."""

from guardrail.decide.remedies.base import EscalationRemedy


class Pause(EscalationRemedy):
    """Pauses and asks, whether or not a screen is open."""

    action = "pause"
    help = "Pause and ask, whether or not a screen is open. Not in the default list."
    keys = ()
    ends_run = True
