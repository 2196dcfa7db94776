"""shrink_embedding: smaller embedding gradients for some steps (GLM-130B).

It is also used without an entry in the escalation list. If the embedding leads an incident, the
first skip or rollback has this effect, with the settings of [guard.shrink_embedding].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardrail.core.records.verdicts import Cause, Remedy
from guardrail.decide.remedies.base import EscalationRemedy

if TYPE_CHECKING:  # as in guardrail.decide.remedies.base
    from guardrail.core.guard_options import GuardOptions


class ShrinkEmbeddingGradients(EscalationRemedy):
    """Restores, and multiplies the embedding gradients by a factor that returns to 1."""

    action = "shrink_embedding"
    help = "Multiply the embedding gradients by `factor`. Only if the embedding leads."
    keys = ("factor", "hold_steps", "ramp_steps", "max_uses", "cooldown")
    effect = "embed_alpha"
    subject = "the gradients of the embedding"
    report_name = "embedding gradients"
    screen_name = "embedding"

    @classmethod
    def fits(cls, cause: Cause | None, *, embedding_leads: bool) -> bool:
        return embedding_leads

    @classmethod
    def first_effects(cls, options: GuardOptions, from_step: int) -> tuple[Remedy, ...]:
        """Return what the first skip or rollback of such an incident does by itself."""
        settings = options.shrink_embedding
        if settings.factor >= 1.0:
            return ()
        return (
            Remedy(
                kind=cls.effect,
                value=settings.factor,
                from_step=from_step,
                hold_steps=settings.hold_steps,
                ramp_steps=settings.ramp_steps,
            ),
        )
