"""Which remedy is used next, from those that were used. Pure.

The remedies of [[guard.escalation]] are used in their order. A remedy is not used in three cases:
it does not fit the cause, it was used `max_uses` times among the recent rollbacks, or its cooldown
is not over. The run halts if no remedy is left, or `guard.max_rollbacks` recent rollbacks have not
helped.

data    Skipping data comes first, whatever the order. Remedies for the optimizer follow.
state   No batch is the cause: no data is skipped, so a wider window is pointless. An anomaly that
        came again from a good state also comes again from an older one. So a lower learning rate is
        used first.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.guard_options import EscalationStep
from guardrail.core.records.verdicts import Cause
from guardrail.decide.remedies.base import EscalationRemedy
from guardrail.decide.remedies.registry import BY_ACTION
from guardrail.decide.rollback import Rollback


def choose_remedy(
    entries: Sequence[EscalationStep],
    recent: Sequence[Rollback],
    rollbacks: Sequence[Rollback],
    *,
    applied: int,
    cause: Cause | None,
    embedding_leads: bool,
) -> EscalationRemedy | None:
    """Return the remedy that answers a call for a rollback; None: all are used up.

    Args:
        entries: of [[guard.escalation]].
        recent: rollbacks without `reset_budget_after` healthy steps between them, up to now.
        rollbacks: all of the run, for cooldowns.
        applied: updates applied so far.
        embedding_leads: the anomaly comes from the embedding.
    """
    for entry in _sort_for_cause(entries, cause):
        remedy = BY_ACTION[entry.action](entry, uses=count_uses(entry.action, recent))
        if not remedy.restores_state or not remedy.fits(cause, embedding_leads=embedding_leads):
            continue
        allowed = sum(other.max_uses for other in entries if other.action == entry.action)
        is_left = remedy.uses < allowed and not _is_cooling_down(entry, rollbacks, applied)
        if remedy.ends_run or is_left:
            return remedy
    return None


def _is_cooling_down(entry: EscalationStep, rollbacks: Sequence[Rollback], applied: int) -> bool:
    """Return whether the last use of a remedy is within its cooldown."""
    if not entry.cooldown:
        return False
    uses = [one.from_step for one in rollbacks if one.escalation == entry.action]
    return bool(uses) and applied - max(uses) < entry.cooldown


def _sort_for_cause(entries: Sequence[EscalationStep], cause: Cause | None) -> list[EscalationStep]:
    """Return the entries in the order in which they are tried against this cause."""
    if cause is not None and cause.of_data:
        return sorted(entries, key=_order_for_data)
    if cause is not Cause.STATE:
        return list(entries)
    older = [entry for entry in entries if BY_ACTION[entry.action].restores_older_state]
    others = [entry for entry in entries if not BY_ACTION[entry.action].restores_older_state]
    end = 0
    for index, entry in enumerate(others):
        if BY_ACTION[entry.action].is_tried_before_older:
            end = index + 1
    if not end:
        return list(entries)
    return [*others[:end], *older, *others[end:]]


def _order_for_data(entry: EscalationStep) -> tuple[bool, bool]:
    remedy = BY_ACTION[entry.action]
    return remedy.ends_run, not remedy.skips_data


def count_uses(action: str, recent: Sequence[Rollback]) -> int:
    """Return how often a remedy was used among the recent rollbacks, without success."""
    return sum(one.escalation == action for one in recent)
