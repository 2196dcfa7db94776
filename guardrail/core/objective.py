"""What kind of number a loss is, by the names of a run's signals. Pure.

A cross-entropy is positive, and its ratios have a meaning. A policy loss of reinforcement learning
has either sign and does not fall with progress. It is exactly 0 where advantages sum to 0. Its
ratios and its logarithm have no meaning.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

_WORD = re.compile(r"[a-z]+")
# Preference training (DPO and its relatives) records rewards too, but minimises a positive loss.
_PREFERENCE = frozenset("chosen rejected margin margins accuracy accuracies".split())
_REWARD = frozenset("reward rewards advantage advantages rlhf".split())
_KL = frozenset("kl approxkl".split())
# A KL divergence to a teacher belongs to distillation, whose loss is positive. A coefficient is not
# measured.
_OTHER_KL = frozenset("distill distillation teacher student kd vae coef coeff beta target".split())
_CLIPPED = frozenset("clipfrac".split())
_POLICY = frozenset("policy pg actor act ppo grpo reinforce".split())
_CRITIC = frozenset("vf value values critic entropy kl rep aux z".split())


@functools.cache
def shows_policy(name: str) -> bool:
    """Return whether only reinforcement learning records this signal.

    Such as a reward, an advantage, a KL divergence or a probability ratio.
    """
    words = _WORD.findall(name.lower())
    found = set(words)
    if found & _PREFERENCE:
        return False
    if found & _REWARD or found & _CLIPPED or (found & _KL and not found & _OTHER_KL):
        return True
    # "clip_ratio/region_mean" and "importance_ratio", but no "grad_clip_ratio" and no
    # "update_ratio".
    clipped = words[:2] == ["clip", "ratio"] and bool(found & {"region", "low", "high", "mean"})
    return clipped or ("ratio" in found and bool(found & {"importance", "policy"}))


@functools.cache
def is_policy_loss(name: str) -> bool:
    """Return whether this is the name of a policy loss: "actor/pg_loss", "loss/policy_avg"."""
    words = set(_WORD.findall(name.lower()))
    return "loss" in words and bool(words & _POLICY) and not words & _CRITIC


def find_policy_signal(names: Iterable[str]) -> str | None:
    """Return the first of these signals that only reinforcement learning records, else None."""
    return next((name for name in names if shows_policy(name)), None)
