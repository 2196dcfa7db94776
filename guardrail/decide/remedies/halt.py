"""halt: save and end the run."""

from guardrail.decide.remedies.base import EscalationRemedy


class Halt(EscalationRemedy):
    """Saves and ends with exit code 3."""

    action = "halt"
    help = "Save and end with exit code 3. Not in the default list."
    keys = ()
    ends_run = True
