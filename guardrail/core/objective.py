"""What kind of number a loss is, as the names of a run's signals show it. Pure.

A cross-entropy is positive, and its ratios mean something. A policy loss of reinforcement learning
has either sign, is exactly 0 where advantages sum to 0, and shows no progress: neither its ratios
nor its logarithm mean anything.
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
# A KL divergence to a teacher belongs to distillation, whose loss is positive; a coefficient is no
# measurement.
_OTHER_KL = frozenset("distill distillation teacher student kd vae coef coeff beta target".split())
_CLIPPED = frozenset("clipfrac".split())
_POLICY = frozenset("policy pg actor act ppo grpo reinforce".split())
_CRITIC = frozenset("vf value values critic entropy kl rep aux z".split())


@functools.cache
def shows_policy(name: str) -> bool:
    """Whether a signal of this name is recorded in reinforcement learning only: reward, advantage,
    KL, ratio.
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
    """Whether this is the name of a policy loss: "actor/pg_loss", "loss/policy_avg"."""
    words = set(_WORD.findall(name.lower()))
    return "loss" in words and bool(words & _POLICY) and not words & _CRITIC


def policy_name(names: Iterable[str]) -> str | None:
    """The first of these signals that reinforcement learning alone records."""
    return next((name for name in names if shows_policy(name)), None)
