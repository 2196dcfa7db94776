"""lower_lr: a lower learning rate for some steps."""

from guardrail.decide.remedies.base import EscalationRemedy


class LowerLr(EscalationRemedy):
    """Restores, and multiplies the learning rate by a factor that returns to 1."""

    action = "lower_lr"
    help = "Multiply the learning rate by `factor` for `hold_steps`, return over `ramp_steps`."
    keys = ("factor", "hold_steps", "ramp_steps", "max_uses", "cooldown")
    effect = "lr"
    subject = "the learning rate"
    report_name = "learning rate"
    screen_name = "rate"
    # An anomaly that came again from a good state also comes again from an older one. So a lower
    # rate is tried first.
    is_tried_before_older = True
