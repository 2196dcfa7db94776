"""The response to a rejected step: an action, its remedy, the effects of the remedy, and the reason.

Pure, and without memory: it depends on a `RejectedStep` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.records.verdicts import Action, Cause, Remedy
from guardrail.decide.embedding_lead import embedding_leads
from guardrail.decide.escalation import choose_remedy
from guardrail.decide.rejected_step import RejectedStep
from guardrail.decide.remedies.base import EscalationRemedy
from guardrail.decide.remedies.effects import EMBED_ALPHA, format_effect
from guardrail.decide.remedies.registry import BY_ACTION
from guardrail.decide.remedies.shrink_embedding import ShrinkEmbeddingGradients
from guardrail.decide.response_reason import Plan, format_reason
from guardrail.decide.rollback_window import compute_rollback_window


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is done about a rejected step.

    Attributes:
        action: what `auto` does.
        escalation: action of the escalation step.
        window: positions [first, last) that are skipped.
        positions: the bad ones among them; (): all.
        before: the restored state is older than this step; None: no state is restored.
        remedies: effects on later steps.
        reason: one sentence with the numbers that led here.
    """

    action: Action
    escalation: str
    window: tuple[int, int]
    positions: tuple[int, ...]
    before: int | None
    remedies: tuple[Remedy, ...]
    reason: str


def respond(case: RejectedStep, action: Action) -> Response:
    """Return the response to a case.

    Args:
        action: what `case.choose_action()` has returned.
    """
    leads = embedding_leads(case.findings)
    remedy = None
    if action is Action.ROLLBACK:
        remedy = choose_remedy(
            case.settings.escalation,
            case.recent_rollbacks,
            case.rollbacks,
            applied=case.applied,
            cause=case.cause,
            embedding_leads=leads,
        )
    skipped, before = _choose_window(case, action, remedy)
    positions = _find_bad_samples(case, remedy, skipped)
    effects = _choose_effects(case, action, remedy, before or case.obs.step, leads=leads)
    escalation = _name_escalation(case, action, remedy)
    if action is Action.ROLLBACK and (remedy is None or remedy.ends_run):
        action = Action.HALT
    plan = Plan(
        action=action,
        escalation=escalation,
        window=skipped,
        bad_samples=len(positions),
        before=before,
    )
    reason = format_reason(case, plan)
    if action is Action.HALT:
        effects = ()
    return Response(
        action=action,
        escalation=escalation,
        window=skipped,
        positions=positions,
        before=before,
        remedies=effects,
        reason="; ".join([reason, *map(format_effect, effects)]),
    )


def _name_escalation(case: RejectedStep, action: Action, remedy: EscalationRemedy | None) -> str:
    """Return the action of the escalation step, for the journal."""
    if action is Action.SKIP:
        return "skip"
    if remedy is not None:
        return remedy.action
    entries = case.settings.escalation
    if case.exceeds_data_skips and entries and BY_ACTION[entries[-1].action].ends_run:
        return entries[-1].action
    return "halt"


def _choose_effects(
    case: RejectedStep,
    action: Action,
    remedy: EscalationRemedy | None,
    from_step: int,
    *,
    leads: bool,
) -> tuple[Remedy, ...]:
    """Return the effects of the remedy, and a smaller embedding gradient if the embedding leads.

    The first skip or rollback of such an incident shrinks it, with any remedy.
    """
    effects: tuple[Remedy, ...] = ()
    if remedy is not None:
        effects = remedy.effects(from_step)
    is_first = not case.recent_rollbacks and (not case.streak or action is Action.ROLLBACK)
    is_shrunk = any(effect.kind == EMBED_ALPHA for effect in effects)
    if leads and is_first and not is_shrunk:
        effects += ShrinkEmbeddingGradients.first_effects(case.settings, from_step)
    return effects


def _choose_window(
    case: RejectedStep, action: Action, remedy: EscalationRemedy | None
) -> tuple[tuple[int, int], int | None]:
    """Return (positions to skip, step that the restored state must precede)."""
    obs = case.obs
    if action is Action.SKIP:
        return (obs.first, obs.last), None
    skipped, before = compute_rollback_window(
        case.onset,
        obs,
        history=case.history,
        settings=case.settings,
        overflows=case.overflows,
        widened=1 if remedy is None else remedy.window_factor(),
    )
    if case.cause is Cause.STATE:
        skipped = (skipped[0], skipped[0])  # no batch is the cause: skip no data
    if remedy is not None:
        before = remedy.move_target(before)
    return skipped, before


def _find_bad_samples(
    case: RejectedStep, remedy: EscalationRemedy | None, skipped: tuple[int, int]
) -> tuple[int, ...]:
    """Return the bad samples of a window; (): the complete window is skipped."""
    if remedy is None or remedy.widens_window:
        return ()
    if case.diagnosis is None or case.cause is not Cause.DATA:
        return ()
    first, last = skipped
    positions = case.diagnosis.positions
    if not all(first <= position < last for position in positions):
        return ()
    return positions
