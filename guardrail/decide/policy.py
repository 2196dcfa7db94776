"""Findings -> what to do: skip, roll back or halt; and which state a rollback restores. Pure.

The rollbacks themselves outlive a rollback, and the journal holds them. So a process that starts
again after a crash decides as the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.status import SnapshotInfo
from guardrail.core.records.verdicts import Action, Cause, Diagnosis
from guardrail.decide.rollback import Rollback
from guardrail.detectors.build import find_detector

_RANK = {Severity.WEIGHTS_DAMAGED: 2, Severity.REJECT: 1, Severity.NOTE: 0}


def sort_by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings, most severe first.

    Among equals NaN comes before any number, then the one that is furthest above its threshold.
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
    """Return what was found, as the beginning of a sentence.

    That is the first finding, and those of the same severity whose value is no usable number.

    Args:
        findings: most severe first.
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
    if not finding.threshold:
        return 0.0
    return finding.score / finding.threshold


def rejects(findings: Iterable[Finding]) -> bool:
    """Return whether this update must not be applied."""
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
    """Return what `auto` does about a step.

    Args:
        findings: of this step.
        streak: batches with an anomaly that were rejected directly before this one.
        rollback_count: how many `recent_rollbacks` there are.
        diagnosis: of the incident, where a cause test has shown it. If the state is the cause,
            skipping updates does not help. If it is data of which nothing was applied, a rollback
            does not help: the weights are clean.
    """
    if not rejects(findings):
        return Action.APPLY
    is_damaged = any(finding.severity is Severity.WEIGHTS_DAMAGED for finding in findings)
    if not is_damaged:
        if not is_anomaly(findings):
            return Action.SKIP
        limit = consecutive_skip_limit(settings)
        if weights_are_clean(diagnosis) and limit > 1:
            return Action.SKIP if streak < settings.max_data_skips else Action.HALT
        if streak + 1 < limit and not _calls_for_rollback(diagnosis):
            return Action.SKIP
    return Action.ROLLBACK if rollback_count < settings.max_rollbacks else Action.HALT


def _calls_for_rollback(diagnosis: Diagnosis | None) -> bool:
    """Return whether the state is the cause, or an update of bad data is in the weights."""
    return diagnosis is not None and (diagnosis.cause is Cause.STATE or diagnosis.applied)


def weights_are_clean(diagnosis: Diagnosis | None) -> bool:
    """Return whether the cause is data of which nothing is in the weights."""
    return diagnosis is not None and diagnosis.cause.of_data and not diagnosis.applied


def consecutive_skip_limit(settings: GuardOptions) -> int:
    """Return how many consecutive rejections cause a rollback; 1 without the remedy `skip`."""
    if any(entry.action == "skip" for entry in settings.escalation):
        return settings.rollback_after_rejections
    return 1


def recent_rollbacks(
    rollbacks: Sequence[Rollback], *, applied: int, healthy_after: int
) -> list[Rollback]:
    """Return the rollbacks without `healthy_after` applied steps between them, up to `applied`.

    Progress is counted from the step at which the earlier rollback was decided, not from the state
    that it restored. To repeat the discarded steps proves nothing, and a long rollback must not
    clear its own record.
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


def count_close_together(steps: Sequence[int], *, at: int, healthy_after: int) -> int:
    """Return how many of these steps are less than `healthy_after` apart, up to `at`.

    Args:
        steps: the newest last.
    """
    count = 0
    for step in reversed(steps):
        if at - step >= healthy_after:
            break
        count += 1
        at = step
    return count


def find_confirmed(
    infos: Iterable[SnapshotInfo], *, healthy_through: int, confirm: int
) -> list[SnapshotInfo]:
    """Return the candidates that `confirm` healthy applied steps have followed: they are good now.

    Args:
        healthy_through: the newest applied step that is surely healthy.
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
    """Return the newest state that a rollback can restore; None: this tier has none.

    Args:
        before_step: the state must be older than this, the first step whose batch is skipped.
        good_only: candidates do not count; suspects never do.
        cursor: first position of the window. The state must not be after it.
    """
    states: tuple[str, ...] = ("good",)
    if not good_only:
        states = ("good", "candidate")
    found = None
    for info in infos:
        if info.state not in states or info.step >= before_step:
            continue
        if cursor is not None and info.cursor > cursor:
            continue
        if found is None or (info.step, info.timeline) > (found.step, found.timeline):
            found = info
    return found
