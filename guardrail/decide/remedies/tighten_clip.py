"""tighten_clip: a lower clipping norm for some steps."""

from guardrail.decide.remedies.base import EscalationRemedy


class TightenClip(EscalationRemedy):
    """Restores, and multiplies the clipping norm by a factor that returns to 1."""

    action = "tighten_clip"
    help = "Multiply the clipping norm by `factor`, in the same way."
    keys = ("factor", "hold_steps", "ramp_steps", "max_uses", "cooldown")
    effect = "clip"
    subject = "the clipping norm"
    report_name = "clipping norm"
    screen_name = "clip"
