"""The detectors of a run, as its settings ask for them."""

from __future__ import annotations

from typing import Any

from guardrail.config import GuardSection
from guardrail.detectors.base import Detector
from guardrail.detectors.divergence import Divergence
from guardrail.detectors.growth import Growth
from guardrail.detectors.nonfinite import NonFinite
from guardrail.detectors.scale import ScaleCollapse
from guardrail.detectors.share import Share
from guardrail.detectors.spike import Spike
from guardrail.detectors.stuck import Stuck
from guardrail.detectors.together import Together
from guardrail.records import EMBED_GRAD_NORM, EMBED_SHARE, GRAD_NORM, LOSS, LOSS_SCALE, UPDATE_NORM, Kind

# Smallest log jump that is ever a spike, as sigmas of this size: 8 x 0.01 = 8 % of the loss, 10 x 0.2 = 7.4-fold for
# a norm. A gradient that is a few times too long is clipped and does no harm.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.2
# Jumps over the first steps' median that are rejected before there is a scale.
LOSS_COLD, NORM_COLD = 3.0, 100.0
# The signals that have a detector of their own; what is called otherwise is a further one.
USUAL = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE, UPDATE_NORM, LOSS_SCALE)
# What the detectors of further signals are called: this and the signal, which may have the name of another detector.
NAMED = "named "
TOGETHER = "together"


def build(settings: GuardSection) -> dict[str, Detector]:
    """Name -> detector, in the order in which they are asked; a spike detector is named after its signal."""
    shared: dict[str, Any] = {"window": settings.window, "warmup": settings.warmup}
    loss = Spike(LOSS, Kind.LOSS_SPIKE, score=settings.loss_score, floor=LOSS_FLOOR, cold_factor=LOSS_COLD, **shared)
    norm: dict[str, Any] = {"floor": NORM_FLOOR, "cold_factor": NORM_COLD, **shared}
    grad = Spike(GRAD_NORM, Kind.GRAD_SPIKE, score=settings.grad_score, **norm)
    embed = Spike(EMBED_GRAD_NORM, Kind.EMBED_SPIKE, score=settings.embed_score, **norm)
    update = Spike(UPDATE_NORM, Kind.UPDATE_SPIKE, score=settings.grad_score, note_only=True, **norm)
    return {
        "nonfinite": NonFinite(),
        LOSS: loss,
        GRAD_NORM: grad,
        TOGETHER: Together(loss, grad),
        EMBED_GRAD_NORM: embed,
        EMBED_SHARE: Share(embed, score=settings.embed_score, **shared),
        UPDATE_NORM: update,
        LOSS_SCALE: ScaleCollapse(overflows=settings.overflows, **shared),
        "divergence": Divergence(
            loss.baseline,
            score=settings.divergence_score,
            steps=settings.divergence_steps,
            window=settings.window,
        ),
        "growth": Growth(GRAD_NORM, grad.baseline, warmup=settings.warmup),
        "embed_growth": Growth(EMBED_GRAD_NORM, embed.baseline, warmup=settings.warmup),
        "update_growth": Growth(UPDATE_NORM, update.baseline, warmup=settings.warmup),
        "stuck_loss": Stuck(LOSS),
        "stuck_grad_norm": Stuck(GRAD_NORM),
    }


def build_named(signal: str, settings: GuardSection) -> Spike:
    """The detector of a signal that is none of the above. It notes: what a spike of it means, nobody has said.

    Such a number counts as a loss if its name ends so, and otherwise as a norm, whose ordinary noise is larger.
    """
    loss = signal.lower().endswith("loss")
    return Spike(
        signal,
        Kind.GRAD_SPIKE if signal.startswith(f"{GRAD_NORM}/") else Kind.SPIKE,
        score=settings.loss_score if loss else settings.grad_score,
        floor=LOSS_FLOOR if loss else NORM_FLOOR,
        cold_factor=LOSS_COLD if loss else NORM_COLD,
        window=settings.window,
        warmup=settings.warmup,
        note_only=True,
    )
