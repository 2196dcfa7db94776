"""Why a rejected step gets its response: one sentence with the numbers that led to it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from guardrail.core.format import format_plural
from guardrail.core.records.verdicts import Action, Cause
from guardrail.decide.policy import (
    consecutive_skip_limit,
    format_evidence,
    is_anomaly,
    weights_are_clean,
)
from guardrail.decide.rejected_step import RejectedStep
from guardrail.detectors.build import find_detector


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parts of a response that the sentence names.

    Attributes:
        escalation: action of the escalation step.
        window: positions [first, last) that are skipped.
        bad_samples: number of samples of the window that are skipped; 0: all of them.
        before: the restored state is older than this step.
    """

    action: Action
    escalation: str
    window: tuple[int, int]
    bad_samples: int
    before: int | None


def format_reason(case: RejectedStep, plan: Plan) -> str:
    """Return the sentence: what was found, why it calls for this, and what is done."""
    found = format_evidence(case.findings)
    would = "would " if case.advise else ""
    if plan.action is Action.SKIP:
        return _explain_skip(case, found, would)
    if plan.action is Action.HALT:
        return _explain_halt(case, plan, found, would)
    again = ""
    if case.recent_rollbacks:
        again = f", remedy {plan.escalation} after {_format_rollbacks(case)}"
    return (
        f"{found}, {_explain_rollback(case)}{again}: "
        f"{would}restore a state from before step {plan.before}, {_format_window(plan)}"
    )


def _explain_skip(case: RejectedStep, found: str, would: str) -> str:
    count = case.streak + 1
    if weights_are_clean(case.diagnosis):
        skips = format_plural(count, "consecutive skip")
        limit = case.settings.max_data_skips
        return f"{found}, bad data: {would}skip the update ({skips}, limit {limit})"
    if not is_anomaly(case.findings):
        return f"{found}: {would}skip the update"
    limit = consecutive_skip_limit(case.settings)
    return f"{found}: {would}skip the update (rejection {count} of {limit} that cause a rollback)"


def _explain_halt(case: RejectedStep, plan: Plan, found: str, would: str) -> str:
    end = "ask" if plan.escalation == "pause" else "halt"
    if case.exceeds_data_skips:
        skips = format_plural(case.streak, "consecutive skip")
        return f"{found}, bad data: {would}{end} after {skips}, the limit guard.max_data_skips"
    why, rollbacks = _explain_rollback(case), _format_rollbacks(case)
    if len(case.recent_rollbacks) >= case.settings.max_rollbacks:
        return f"{found}, {why}: {would}halt after {rollbacks}, the limit guard.max_rollbacks"
    return (
        f"{found}, {why}: {would}{end} after {rollbacks}, "
        "since no remedy of guard.escalation that fits is left"
    )


def _explain_rollback(case: RejectedStep) -> str:
    """Return why skipping is not enough."""
    own = find_detector(case.findings[0].kind).explain_rollback(case.findings[0])
    if own:
        return own
    if case.cause is Cause.STATE:
        return "with every batch"
    count = case.streak + 1
    if count >= consecutive_skip_limit(case.settings):
        return format_plural(count, "consecutive rejection")
    if case.diagnosis is not None and case.diagnosis.applied:
        return "an update of such data is in the weights"
    return "which stays up"


def _format_rollbacks(case: RejectedStep) -> str:
    """Return "2 rollbacks without 200 healthy steps between them"."""
    count = len(case.recent_rollbacks)
    where = "after it" if count == 1 else "between them"
    steps = case.settings.reset_budget_after
    return f"{format_plural(count, 'rollback')} without {steps} healthy steps {where}"


def _format_window(plan: Plan) -> str:
    first, last = plan.window
    if first == last:
        return "skip no data"
    positions = f"positions {first} to {last - 1}"
    if plan.bad_samples:
        return f"skip {format_plural(plan.bad_samples, 'bad sample')} of {positions}"
    return f"skip {positions}"
