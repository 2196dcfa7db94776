"""The effects of remedies at one step: the product of their factors, and what a sentence says."""

from __future__ import annotations

import math
from collections.abc import Iterable

from guardrail.core.records.verdicts import Remedy
from guardrail.decide.remedies.lower_lr import LowerLr
from guardrail.decide.remedies.registry import find_effect
from guardrail.decide.remedies.reset_moments import ResetMoments
from guardrail.decide.remedies.shrink_embedding import ShrinkEmbeddingGradients
from guardrail.decide.remedies.tighten_clip import TightenClip

LR, CLIP = LowerLr.effect, TightenClip.effect
EMBED_ALPHA, MOMENTS = ShrinkEmbeddingGradients.effect, ResetMoments.effect


def compute_factor(effects: Iterable[Remedy], kind: str, step: int, *, floor: float = 0.0) -> float:
    """Return the product of all effects of a kind at a step; 1.0 where there is none.

    Args:
        floor: a product below 1 is not lower than this.
    """
    remedy = find_effect(kind)
    product = math.prod(remedy.factor_at(effect, step) for effect in effects if effect.kind == kind)
    if product >= 1.0:
        return product
    return max(product, floor)


def resets_moments(effects: Iterable[Remedy], step: int) -> bool:
    """Return whether the optimizer's moments are set to zero before the update of this step."""
    return any(effect.kind == MOMENTS and effect.from_step == step for effect in effects)


def format_effect(effect: Remedy) -> str:
    """Return the effect in words: "the learning rate x 0.5 from step 120 for 100 steps"."""
    return find_effect(effect.kind).sentence(effect)
