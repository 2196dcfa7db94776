"""What is done about a rejected step, by what is known of its incident, and why: an action, its
rung, its remedies.

Pure, and without memory: a `RejectedStep` holds all that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guardrail.core.format import format_plural
from guardrail.core.guard_options import EscalationStep, GuardOptions
from guardrail.core.records import (
    Action,
    Cause,
    Diagnosis,
    Finding,
    Observation,
    Remedy,
    Severity,
)
from guardrail.decide.ladder import ENDS, next_rung, times_taken, widening
from guardrail.decide.policy import (
    Rollback,
    consecutive_skip_limit,
    decide,
    evidence,
    is_anomaly,
    recent_rollbacks,
    weights_are_clean,
)
from guardrail.decide.remedies import EMBED_ALPHA, embedding_leads, of_embedding, of_rung, sentence
from guardrail.decide.rollback_window import Applied, window
from guardrail.detectors.build import find_detector


@dataclass(frozen=True, kw_only=True)
class RejectedStep:
    """A rejected step and what is known of it.

    Attributes:
        findings: most severe first.
        onset: first step of the trouble.
        streak: troubled batches that were rejected directly before this one.
        rollbacks: all of the run, oldest first.
        diagnosis: what a replay has told about the incident.
        history: the last applied batches, oldest first.
        overflows: of the loss scale in a row, up to this step.
        advise: nothing of it is done: the reason says what would be.
    """

    obs: Observation
    findings: tuple[Finding, ...]
    onset: int
    streak: int
    rollbacks: Sequence[Rollback]
    diagnosis: Diagnosis | None
    history: Sequence[Applied]
    overflows: int
    settings: GuardOptions
    advise: bool = False

    @property
    def cause(self) -> Cause | None:
        return None if self.diagnosis is None else self.diagnosis.cause

    @property
    def too_long(self) -> bool:
        """Whether data alone has been left out for longer than `skips` allows."""
        grave = any(finding.severity is Severity.WEIGHTS_DAMAGED for finding in self.findings)
        return (
            weights_are_clean(self.diagnosis)
            and not grave
            and self.streak >= self.settings.max_data_skips
        )

    @property
    def applied(self) -> int:
        """Updates applied so far."""
        return self.obs.step - 1

    @property
    def row(self) -> list[Rollback]:
        """Rollbacks without enough healthy steps between them, up to now."""
        return recent_rollbacks(
            self.rollbacks, applied=self.applied, healthy_after=self.settings.reset_budget_after
        )

    def action(self) -> Action:
        """What `auto` does, as long as there is a rung for it."""
        return decide(
            self.findings,
            streak=self.streak,
            in_a_row=len(self.row),
            settings=self.settings,
            diagnosis=self.diagnosis,
        )


@dataclass(frozen=True, kw_only=True)
class Response:
    """Attributes:
    action: what `auto` does.
    escalation: action of the escalation step.
    window: positions [first, last) that are left out.
    positions: those of the window that are to blame; (): all.
    before: the state to go back to is older than this step; None where it does not go back.
    remedies: what goes with it.
    reason: one sentence with the numbers that led here.
    """

    action: Action
    escalation: str
    window: tuple[int, int]
    positions: tuple[int, ...]
    before: int | None
    remedies: tuple[Remedy, ...]
    reason: str


def answer(case: RejectedStep, action: Action) -> Response:
    """What is done about a case whose `action()` this is."""
    settings, row, leads = case.settings, case.row, embedding_leads(case.findings)
    rung: EscalationStep | None = None
    if action is Action.ROLLBACK:
        rung = next_rung(
            settings.escalation,
            row,
            case.rollbacks,
            applied=case.applied,
            cause=case.cause,
            embedding=leads,
        )
    again = 0 if rung is None else times_taken(rung, row)
    out, before = _window(case, action, rung)
    few = _few(case, rung, out)
    remedies: tuple[Remedy, ...] = (
        () if rung is None else of_rung(rung, before or case.obs.step, again=again)
    )
    asked = leads and not row and (not case.streak or action is Action.ROLLBACK)
    if asked and not any(remedy.kind == EMBED_ALPHA for remedy in remedies):
        remedies += of_embedding(settings, before or case.obs.step)
    name = "skip" if action is Action.SKIP else (rung.action if rung is not None else _end(case))
    if action is Action.ROLLBACK and (rung is None or rung.action in ENDS):
        action = Action.HALT
    reason = _reason(case, action, window=out, few=len(few), before=before, rung=name)
    if action is Action.HALT:
        remedies = ()
    if remedies:
        reason += "; " + "; ".join(map(sentence, remedies))
    return Response(
        action=action,
        escalation=name,
        window=out,
        positions=few,
        before=before,
        remedies=remedies,
        reason=reason,
    )


def _end(case: RejectedStep) -> str:
    """Which end it is where no rung is asked for."""
    ladder = case.settings.escalation
    return ladder[-1].action if case.too_long and ladder and ladder[-1].action in ENDS else "halt"


def _window(
    case: RejectedStep, action: Action, rung: EscalationStep | None
) -> tuple[tuple[int, int], int | None]:
    """(Positions to leave out, the step that the state to go back to is older than), of this action
    and rung.
    """
    obs = case.obs
    if action is Action.SKIP:
        return (obs.first, obs.last), None
    out, before = window(
        case.onset,
        obs,
        history=case.history,
        settings=case.settings,
        overflows=case.overflows,
        widened=widening(rung, case.row) if rung is not None else 1,
    )
    if case.cause is Cause.STATE:
        out = (out[0], out[0])  # no batch is to blame: go back, and leave nothing out
    if rung is not None and rung.action == "older":
        before = max(1, before - rung.steps)
    return out, before


def _few(
    case: RejectedStep, rung: EscalationStep | None, window: tuple[int, int]
) -> tuple[int, ...]:
    """The samples of a window that are to blame; () where all of it goes.

    To widen means that what was left out was not enough: then nothing of the window is kept.
    """
    if (
        rung is None
        or rung.action == "widen"
        or case.diagnosis is None
        or case.cause is not Cause.DATA
    ):
        return ()
    few = case.diagnosis.positions
    return few if all(window[0] <= position < window[1] for position in few) else ()


def _reason(
    case: RejectedStep,
    action: Action,
    *,
    window: tuple[int, int],
    few: int,
    before: int | None,
    rung: str,
) -> str:
    settings, findings, streak, row = case.settings, case.findings, case.streak, case.row
    what, would = evidence(findings), "would " if case.advise else ""
    if action is Action.SKIP and weights_are_clean(case.diagnosis):
        count = f"{streak + 1} in a row of at most {settings.max_data_skips}"
        return f"{what}, the data is to blame: {would}leave this update out, {count}"
    if action is Action.SKIP:
        count = f", rejection {streak + 1} in a row of {consecutive_skip_limit(settings)} that call for a rollback"
        return f"{what}: {would}leave this update out{count if is_anomaly(findings) else ''}"
    if action is Action.HALT and case.too_long:
        end = "ask" if rung == "pause" else "halt"
        return (
            f"{what}, the data is to blame: {would}{end}, "
            f"since {streak} in a row are as many as guard.max_data_skips allows"
        )
    why = (
        f"{streak + 1} batches in a row rejected"
        if streak + 1 >= consecutive_skip_limit(settings)
        else "it has stayed up"
    )
    own = find_detector(findings[0].kind).explain_rollback(findings[0])
    if own:
        why = own
    elif case.cause is Cause.STATE:
        why = "whatever the batch"
    elif (
        case.diagnosis is not None
        and case.diagnosis.applied
        and streak + 1 < consecutive_skip_limit(settings)
    ):
        why = "and an update of such data is in the weights"
    one = len(row) == 1
    tried = f"{format_plural(len(row), 'rollback')} without {settings.reset_budget_after} healthy steps "
    tried += "after it" if one else "between them"
    if action is Action.HALT and len(row) >= settings.max_rollbacks:
        verb = "is" if one else "are"
        return (
            f"{what}, {why}: {would}halt, "
            f"since {tried} {verb} as many as guard.max_rollbacks allows"
        )
    if action is Action.HALT:
        end = "ask" if rung == "pause" else "halt"
        spent = f"{tried} {'has' if one else 'have'} used up the rungs of guard.escalation that fit"
        return f"{what}, {why}: {would}{end}, since {spent}"
    out = (
        "leave nothing out"
        if window[0] == window[1]
        else f"leave out positions {window[0]} to {window[1] - 1}"
    )
    if few:
        samples = "the one sample" if few == 1 else f"the {few} samples"
        out = f"leave out {samples} to blame of positions {window[0]} to {window[1] - 1}"
    again = f", rung {rung} after {tried}" if row else ""
    return f"{what}, {why}{again}: {would}go back before step {before}, {out}"
