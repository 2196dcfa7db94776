"""Remedies as functions of the step: what a rung of the ladder does besides leaving data out. Pure.

A remedy holds from a step on, whichever state the run went back to, so that a run which goes on
from another state, or is told of the remedy from its beginning (`guard.remedies`), makes the same
updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from guardrail.core.format import format_plural
from guardrail.core.guard_options import EscalationStep, GuardOptions
from guardrail.core.records import (
    EMBED_GRAD_NORM,
    EMBED_SHARE,
    Action,
    Finding,
    FindingKind,
    Remedy,
    Severity,
    Verdict,
)

LR, EMBED_ALPHA, CLIP, MOMENTS = "lr", "embed_alpha", "clip", "moments"
KIND_OF = {
    "lower_lr": LR,
    "shrink_embedding": EMBED_ALPHA,
    "tighten_clip": CLIP,
    "reset_moments": MOMENTS,
}
WORDS = {
    LR: "the learning rate",
    EMBED_ALPHA: "the gradients of the embedding",
    CLIP: "the clipping norm",
}
EMBEDDING = (EMBED_GRAD_NORM, EMBED_SHARE)


def factor(remedies: Iterable[Remedy], kind: str, step: int, *, floor: float = 0.0) -> float:
    """The product of all remedies of a kind at a step, not below the floor: 1 where there is
    none.
    """
    product = math.prod(_at(remedy, step) for remedy in remedies if remedy.kind == kind)
    return max(product, floor) if product < 1.0 else product


def _at(remedy: Remedy, step: int) -> float:
    since = step - remedy.from_step
    if since < 0 or since >= remedy.hold_steps + remedy.ramp_steps:
        return 1.0
    if since < remedy.hold_steps:
        return remedy.value
    return remedy.value + (1.0 - remedy.value) * (since - remedy.hold_steps + 1) / (
        remedy.ramp_steps + 1
    )


def resets(remedies: Iterable[Remedy], step: int) -> bool:
    """Whether the optimizer's moments are set to zero before the update of this step."""
    return any(remedy.kind == MOMENTS and remedy.from_step == step for remedy in remedies)


def of_rung(rung: EscalationStep, from_step: int, *, again: int = 0) -> tuple[Remedy, ...]:
    """What goes with a rung. Without moments Adam's first steps are of full size, so the rate is
    low as well.

    Args:
        again: times that it has been taken in vain. Each time is twice as strong, a factor squared
            for twice as long, on top of what is in force.
    """
    kind = KIND_OF.get(rung.action)
    if kind is None:
        return ()
    much = 2**again
    value, hold, back = rung.factor**much, rung.hold_steps * much, rung.ramp_steps * much
    if kind == MOMENTS:
        low = Remedy(kind=LR, value=value, from_step=from_step, hold_steps=hold, ramp_steps=back)
        return Remedy(kind=MOMENTS, value=1.0, from_step=from_step), low
    return (Remedy(kind=kind, value=value, from_step=from_step, hold_steps=hold, ramp_steps=back),)


def of_embedding(settings: GuardOptions, from_step: int) -> tuple[Remedy, ...]:
    """What an incident that the embedding leads does to its gradients by itself."""
    if settings.shrink_embedding.factor >= 1.0:
        return ()
    hold, back = settings.shrink_embedding.hold_steps, settings.shrink_embedding.ramp_steps
    return (
        Remedy(
            kind=EMBED_ALPHA,
            value=settings.shrink_embedding.factor,
            from_step=from_step,
            hold_steps=hold,
            ramp_steps=back,
        ),
    )


def embedding_leads(findings: Sequence[Finding]) -> bool:
    """Whether the trouble comes from the embedding: its share ran away, or its norm alone or first
    was too high.
    """
    grave = [finding for finding in findings if finding.severity is not Severity.NOTE]
    if any(finding.kind is FindingKind.NONFINITE for finding in grave):
        return False
    own = [finding for finding in grave if finding.signal in EMBEDDING]
    others = [finding for finding in grave if finding.signal not in EMBEDDING]
    ran_away = any(finding.signal == EMBED_SHARE for finding in findings)
    if not own:
        return False
    return ran_away or not others or min(f.onset for f in own) < min(f.onset for f in others)


def embedding_concerned(verdict: Verdict) -> bool:
    """Whether a step was rejected, or would be, with something finite found of the embedding: worth
    naming tokens.
    """
    rejected = (
        verdict.action not in (Action.APPLY, Action.FP16_OVERFLOW) or verdict.would is not None
    )
    return rejected and any(
        f.signal in EMBEDDING and math.isfinite(f.value) for f in verdict.findings
    )


def sentence(remedy: Remedy) -> str:
    """ "the learning rate x 0.5 from step 120 for 100 steps, back over 200"."""
    if remedy.kind == MOMENTS:
        return f"the optimizer's moments at zero before step {remedy.from_step}"
    back = f", back over {remedy.ramp_steps}" if remedy.ramp_steps else ""
    what = WORDS.get(remedy.kind, remedy.kind)
    steps = format_plural(remedy.hold_steps, "step")
    return f"{what} x {remedy.value:g} from step {remedy.from_step} for {steps}{back}"
