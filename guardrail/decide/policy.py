"""Findings -> what to do: the ladder, the budget of rollbacks, and which state to go back to. Pure
functions.

What outlives a rollback (the rollbacks themselves) is a list of facts that the journal holds too,
so that a process which starts again after a crash decides as the one that died would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import (
    Action,
    Cause,
    Diagnosis,
    Finding,
    FindingKind,
    Severity,
    SnapshotInfo,
)
from guardrail.decide.rollback import Rollback
from guardrail.detectors.build import find_detector

_RANK = {Severity.WEIGHTS_DAMAGED: 2, Severity.REJECT: 1, Severity.NOTE: 0}


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Most severe first; among equals the one that is furthest over its threshold, and NaN before
    any number.
    """
    return tuple(sorted(findings, key=_order))


def _order(finding: Finding) -> tuple[int, bool, bool, float]:
    severity = -_RANK[finding.severity]
    return (
        severity,
        finding.threshold != 0.0,
        finding.kind is FindingKind.IMPOSSIBLE,
        -_excess(finding),
    )


def format_evidence(findings: Sequence[Finding]) -> str:
    """What was found, as the beginning of a sentence: the most severe finding, and all that is no
    usable number.
    """
    if not findings:
        return ""
    first, *others = findings
    sentences = [first.sentence()]
    for finding in others:
        is_unusable = find_detector(finding.kind).has_unusable_value
        if is_unusable and finding.severity is first.severity:
            sentences.append(finding.sentence())
    return " and ".join(sentences)


def _excess(finding: Finding) -> float:
    return finding.score / finding.threshold if finding.threshold else 0.0


def rejects(findings: Iterable[Finding]) -> bool:
    """Whether this update must not be applied."""
    return any(finding.severity is not Severity.NOTE for finding in findings)


def is_anomaly(findings: Iterable[Finding]) -> bool:
    """Return whether something is wrong with the run, and not only with a batch without labels.

    Such batches never add up to a rollback, however many are consecutive.
    """
    return any(
        finding.severity is not Severity.NOTE and find_detector(finding.kind).is_anomaly
        for finding in findings
    )


def decide_action(
    findings: Sequence[Finding],
    *,
    streak: int,
    rollback_count: int,
    settings: GuardOptions,
    diagnosis: Diagnosis | None = None,
) -> Action:
    """What `auto` does.

    Args:
        findings: of this step.
        streak: troubled batches rejected directly before this one.
        rollback_count: how many `recent_rollbacks` there are.
        diagnosis: of the incident, where a replay has told it. Where it is the state, to leave
            updates out is pointless; where it is data of which nothing was applied, to go back is:
            the weights are as they were.
    """
    if not rejects(findings):
        return Action.APPLY
    persistent = any(finding.severity is Severity.WEIGHTS_DAMAGED for finding in findings)
    trouble = is_anomaly(findings)
    if (
        trouble
        and not persistent
        and weights_are_clean(diagnosis)
        and consecutive_skip_limit(settings) > 1
    ):
        return Action.SKIP if streak < settings.max_data_skips else Action.HALT
    serious = streak + 1 >= consecutive_skip_limit(settings) or (
        diagnosis is not None and (diagnosis.cause is Cause.STATE or diagnosis.applied)
    )
    if not persistent and not (trouble and serious):
        return Action.SKIP
    return Action.ROLLBACK if rollback_count < settings.max_rollbacks else Action.HALT


def weights_are_clean(diagnosis: Diagnosis | None) -> bool:
    """Whether a replay has put the trouble down to data of which nothing is in the weights."""
    return diagnosis is not None and diagnosis.cause.of_data and not diagnosis.applied


def consecutive_skip_limit(settings: GuardOptions) -> int:
    """Return how many consecutive rejections cause a rollback; 1 without the remedy `skip`."""
    if any(entry.action == "skip" for entry in settings.escalation):
        return settings.rollback_after_rejections
    return 1


def recent_rollbacks(
    rollbacks: Sequence[Rollback], *, applied: int, healthy_after: int
) -> list[Rollback]:
    """Rollbacks that lie less than `healthy_after` applied steps apart, the last one less than that
    before `applied`.

    Progress is counted from where the earlier rollback gave up, not from where it went back to:
    re-running the abandoned stretch proves nothing, and a far rollback must not clear its own
    record.
    """
    found: list[Rollback] = []
    for rollback in reversed(rollbacks):
        if rollback.by_person:
            continue
        if applied - rollback.from_step >= healthy_after:
            break
        found.append(rollback)
        applied = rollback.from_step
    return found[::-1]


def close_together(steps: Sequence[int], *, at: int, healthy_after: int) -> int:
    """How many of these steps, the newest last, lie less than `healthy_after` apart, the last so
    near to `at`.
    """
    count = 0
    for step in reversed(steps):
        if at - step >= healthy_after:
            break
        count += 1
        at = step
    return count


def confirmed(
    infos: Iterable[SnapshotInfo], *, healthy_through: int, confirm: int
) -> list[SnapshotInfo]:
    """Candidates that `confirm` healthy applied steps have followed: they count as good from now
    on.

    Args:
        healthy_through: the newest applied step that is surely healthy; see
        `Controller.healthy_through`.
    """
    return [
        info
        for info in infos
        if info.state == "candidate" and info.step + confirm <= healthy_through
    ]


def choose_target(
    infos: Iterable[SnapshotInfo],
    before_step: int,
    *,
    good_only: bool = True,
    cursor: int | None = None,
) -> SnapshotInfo | None:
    """The newest state from strictly before `before_step`, the first step whose batch is in the
    window.

    Args:
        good_only: candidates do not count; suspects never do.
        cursor: first position of the window, as a second bound: the state must not have passed it.

    Returns:
        None if there is none: the caller goes to the next tier.
    """
    states = ("good",) if good_only else ("good", "candidate")
    fit = [
        info
        for info in infos
        if info.state in states
        and info.step < before_step
        and (cursor is None or info.cursor <= cursor)
    ]
    return max(fit, key=lambda info: (info.step, info.timeline), default=None)
