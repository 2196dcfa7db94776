"""Which rung of the ladder comes next, from what has been tried. Pure.

Rungs are gone up in their order. One is passed over while it does not fit the cause, when it has
been taken `times` times among the rollbacks in a row, or within its cooldown. When none is left, or
`guard.max_rollbacks` of them in a row have not helped, the run halts.

    data    leaving data out comes first, whatever the order; optimizer remedies once that is used up
    state   no batch is to blame: nothing is left out, so to widen the window is pointless. What came again from a good
            state will come again from an older one, so a lower learning rate comes before that
"""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.guard_options import EscalationStep
from guardrail.core.records import Cause
from guardrail.decide.policy import Rollback

DATA_RUNGS = ("rollback", "widen", "older")
ENDS = ("pause", "halt")


def next_rung(
    ladder: Sequence[EscalationStep],
    in_a_row: Sequence[Rollback],
    rollbacks: Sequence[Rollback],
    *,
    applied: int,
    cause: Cause | None,
    embedding: bool,
) -> EscalationStep | None:
    """The rung that answers a call for a rollback; None when all are used up.

    Args:
        in_a_row: rollbacks without `healthy_after` healthy steps between them, up to now.
        rollbacks: all of the run, for cooldowns.
        applied: updates applied so far.
        embedding: the embedding leads the incident.
    """
    for rung in _in_order(ladder, cause):
        if rung.action == "skip" or not _fits(rung, cause, embedding):
            continue
        used = times_taken(rung, in_a_row)
        allowed = sum(other.max_uses for other in ladder if other.action == rung.action)
        last = max(
            (one.from_step for one in rollbacks if one.escalation == rung.action), default=None
        )
        resting = last is not None and rung.cooldown > 0 and applied - last < rung.cooldown
        if rung.action in ENDS or (used < allowed and not resting):
            return rung
    return None


def _fits(rung: EscalationStep, cause: Cause | None, embedding: bool) -> bool:
    if rung.action == "shrink_embedding":
        return embedding
    return rung.action != "widen" or cause is not Cause.STATE


def _in_order(ladder: Sequence[EscalationStep], cause: Cause | None) -> list[EscalationStep]:
    if cause is not None and cause.of_data:
        return sorted(ladder, key=lambda rung: (rung.action in ENDS, rung.action not in DATA_RUNGS))
    if cause is not Cause.STATE:
        return list(ladder)
    older = [rung for rung in ladder if rung.action == "older"]
    rest = [rung for rung in ladder if rung.action != "older"]
    behind = max(
        (at + 1 for at, rung in enumerate(rest) if rung.action == "lower_lr"), default=None
    )
    return list(ladder) if behind is None else [*rest[:behind], *older, *rest[behind:]]


def times_taken(rung: EscalationStep, in_a_row: Sequence[Rollback]) -> int:
    """How often a rung of this kind has been taken in a row, in vain."""
    return sum(one.escalation == rung.action for one in in_a_row)


def widening(rung: EscalationStep, in_a_row: Sequence[Rollback]) -> int:
    """By how much the window is longer than the plain one: 2 for the first widening in a row, then
    4, 8, ...
    """
    if rung.action != "widen":
        return 1
    return int(2 ** (1 + times_taken(rung, in_a_row)))
