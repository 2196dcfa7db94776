"""The detectors of a run, as its settings ask for them."""

from __future__ import annotations

from typing import Any

from guardrail.core.guard_options import GuardOptions
from guardrail.core.objective import policy_name
from guardrail.core.records import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    GRAD_NORM,
    LOSS,
    LOSS_SCALE,
    UPDATE_NORM,
    FindingKind,
)
from guardrail.detectors.base import Detector
from guardrail.detectors.divergence import Divergence
from guardrail.detectors.embedding_share import EmbeddingShare
from guardrail.detectors.growth import Growth
from guardrail.detectors.joint_cusum import JointCusum
from guardrail.detectors.loss_scale import ScaleCollapse
from guardrail.detectors.nonfinite import NonFinite
from guardrail.detectors.signed_loss import SignedLoss
from guardrail.detectors.spike import Spike
from guardrail.detectors.stuck import Stuck

# Smallest log jump that is ever a spike, as sigmas of this size: 8 x 0.01 = 8 % of the loss, 10 x
# 0.2 = 7.4-fold for a norm of gradients. A gradient that is a few times too long is clipped and
# does no harm.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.2
# The norm of an update, and what else is measured, is judged by its own scatter. Under Adam an
# update norm scatters by a few per cent, and one that has doubled is in the weights already. A note
# takes 22 % at least (0.6 x 10 x 0.033).
QUIET_FLOOR = 0.033
# Jumps over the first steps' median that are rejected before there is a scale.
LOSS_COLD, NORM_COLD = 3.0, 100.0
# The signals that have a detector of their own; what is called otherwise is a further one.
USUAL = (LOSS, GRAD_NORM, EMBED_GRAD_NORM, EMBED_SHARE, UPDATE_NORM, LOSS_SCALE)
# What the detectors of further signals are called: this and the signal, which may have the name of
# another detector.
NAMED = "named "
TOGETHER = "together"
SIGNED_LOSS = "signed_loss"
# The detectors of a positive loss: they compare ratios.
POSITIVE_LOSS = (LOSS, TOGETHER, "divergence", "stuck_loss")


def build(settings: GuardOptions) -> dict[str, Detector]:
    """Name -> detector, in the order in which they are asked; a spike detector is named after its
    signal.
    """
    shared: dict[str, Any] = {"window": settings.window, "warmup": settings.warmup}
    signed = SignedLoss(_loss_kind(settings))
    positive: dict[str, Any] = {
        "floor": LOSS_FLOOR,
        "cold_factor": LOSS_COLD,
        "signed": signed,
        **shared,
    }
    loss = Spike(LOSS, FindingKind.LOSS_SPIKE, score=settings.loss_score, **positive)
    scale = ScaleCollapse(overflows=settings.rollback_after_overflows, **shared)
    norm: dict[str, Any] = {
        "floor": NORM_FLOOR,
        "cold_factor": NORM_COLD,
        "loss_scale": scale,
        **shared,
    }
    grad = Spike(GRAD_NORM, FindingKind.GRAD_SPIKE, score=settings.grad_score, **norm)
    embed = Spike(EMBED_GRAD_NORM, FindingKind.EMBED_SPIKE, score=settings.embed_score, **norm)
    own: dict[str, Any] = {"floor": QUIET_FLOOR, "cold_factor": NORM_COLD, **shared}
    update = Spike(
        UPDATE_NORM, FindingKind.UPDATE_SPIKE, score=settings.grad_score, note_only=True, **own
    )
    return {
        "nonfinite": NonFinite(),
        SIGNED_LOSS: signed,
        LOSS: loss,
        GRAD_NORM: grad,
        TOGETHER: JointCusum(loss, grad),
        EMBED_GRAD_NORM: embed,
        EMBED_SHARE: EmbeddingShare(embed, score=settings.embed_score, **shared),
        UPDATE_NORM: update,
        LOSS_SCALE: scale,
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


def _loss_kind(settings: GuardOptions) -> str:
    if settings.loss == "auto" and policy_name(settings.extra_signals) is not None:
        return "signed"
    return settings.loss


def build_named(signal: str, settings: GuardOptions) -> Spike:
    """The detector of a signal that is none of the above. It notes: what a spike of it means,
    nobody has said.

    Such a number counts as a loss if its name ends so, and as the gradient norm of a block if it
    begins so. The scatter of anything else is its own.
    """
    loss = signal.lower().endswith("loss")
    gradient = signal.startswith(f"{GRAD_NORM}/")
    floor = NORM_FLOOR if gradient else QUIET_FLOOR
    return Spike(
        signal,
        FindingKind.GRAD_SPIKE if gradient else FindingKind.SPIKE,
        score=settings.loss_score if loss else settings.grad_score,
        floor=LOSS_FLOOR if loss else floor,
        cold_factor=LOSS_COLD if loss else NORM_COLD,
        window=settings.window,
        warmup=settings.warmup,
        note_only=True,
    )
