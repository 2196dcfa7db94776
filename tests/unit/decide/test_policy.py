from __future__ import annotations

import pytest

from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding, FindingKind, Severity
from guardrail.core.records.status import SnapshotInfo
from guardrail.core.records.verdicts import Action
from guardrail.decide.incidents import Incidents
from guardrail.decide.policy import (
    choose_target,
    decide_action,
    find_confirmed,
    is_anomaly,
    recent_rollbacks,
    sort_by_severity,
)
from guardrail.decide.rollback import Rollback
from tests.support.findings import make_finding

SETTINGS = GuardOptions(rollback_after_rejections=3, max_rollbacks=2, reset_budget_after=100)


def finding(
    severity: Severity,
    kind: FindingKind = FindingKind.LOSS_SPIKE,
    score: float = 10.0,
    threshold: float = 8.0,
) -> Finding:
    return make_finding(9, kind=kind, severity=severity, score=score, threshold=threshold)


NOTE, REJECT = finding(Severity.NOTE), finding(Severity.REJECT)
PERSISTENT = finding(Severity.WEIGHTS_DAMAGED, FindingKind.DIVERGENCE)
EMPTY = finding(Severity.REJECT, FindingKind.NO_TOKENS, 0.0, 0.0)
NAN = finding(Severity.REJECT, FindingKind.NONFINITE, 0.0, 0.0)


@pytest.mark.parametrize(
    ("findings", "streak", "in_a_row", "action"),
    [
        ([], 0, 0, Action.APPLY),
        ([], 9, 9, Action.APPLY),
        ([NOTE], 9, 9, Action.APPLY),
        ([REJECT], 0, 0, Action.SKIP),
        ([REJECT], 1, 9, Action.SKIP),
        ([REJECT], 2, 0, Action.ROLLBACK),
        ([NAN, NOTE], 2, 1, Action.ROLLBACK),
        ([REJECT], 2, 2, Action.HALT),
        ([PERSISTENT], 0, 0, Action.ROLLBACK),
        ([PERSISTENT], 0, 2, Action.HALT),
        ([EMPTY], 50, 9, Action.SKIP),
    ],
)
def test_the_ladder(findings: list[Finding], streak: int, in_a_row: int, action: Action) -> None:
    assert (
        decide_action(findings, streak=streak, rollback_count=in_a_row, settings=SETTINGS) is action
    )


def test_a_budget_of_nothing_halts_at_once_and_a_persist_of_one_rolls_back_at_once() -> None:
    settings = GuardOptions(rollback_after_rejections=1, max_rollbacks=0)
    assert decide_action([REJECT], streak=0, rollback_count=0, settings=settings) is Action.HALT
    assert (
        decide_action(
            [REJECT], streak=0, rollback_count=0, settings=GuardOptions(rollback_after_rejections=1)
        )
        is Action.ROLLBACK
    )


def test_evidence_stands_most_severe_first_and_nan_before_numbers() -> None:
    far = finding(Severity.REJECT, score=80.0)
    assert sort_by_severity([NOTE, REJECT, far, NAN, PERSISTENT]) == (
        PERSISTENT,
        NAN,
        far,
        REJECT,
        NOTE,
    )


def test_a_batch_without_labels_is_no_trouble() -> None:
    assert not is_anomaly([EMPTY]) and not is_anomaly([NOTE]) and is_anomaly([EMPTY, REJECT])


def done(from_step: int, to_step: int, *, by_person: bool = False) -> Rollback:
    return Rollback(
        from_step=from_step, to_step=to_step, onset=from_step, window=(0, 1), by_person=by_person
    )


@pytest.mark.parametrize(
    ("rollbacks", "applied", "count"),
    [
        ([], 500, 0),
        ([done(400, 390)], 499, 1),
        ([done(400, 390)], 500, 0),
        ([done(400, 390)], 395, 1),  # failed again before it got back to where it was
        ([done(300, 290), done(399, 390)], 450, 2),
        ([done(300, 290), done(400, 390)], 450, 1),
        ([done(100, 90), done(300, 290), done(400, 390)], 450, 1),
        ([done(400, 100)], 450, 1),  # far back: the 300 steps that are run again clear nothing
        ([done(400, 390, by_person=True)], 450, 0),
        ([done(395, 390), done(400, 390, by_person=True)], 450, 1),
    ],
)
def test_rollbacks_in_a_row_lie_less_than_healthy_after_apart(
    rollbacks: list[Rollback], applied: int, count: int
) -> None:
    recent = recent_rollbacks(rollbacks, applied=applied, healthy_after=100)
    assert len(recent) == count


def info(
    step: int, state: str = "good", *, timeline: int = 0, cursor: int | None = None
) -> SnapshotInfo:
    return SnapshotInfo(
        step=step,
        cursor=step * 16 if cursor is None else cursor,
        timeline=timeline,
        tier="memory",
        state=state,
    )


def test_the_target_is_the_newest_good_state_strictly_before_the_window() -> None:
    infos = [info(10), info(20), info(30), info(40, "candidate"), info(25, "suspect")]
    assert choose_target(infos, 31) == info(30)
    assert choose_target(infos, 30) == info(20)
    assert choose_target(infos, 100) == info(30)
    assert choose_target(infos, 100, good_only=False) == info(40, "candidate")
    assert choose_target(infos, 10) is None
    assert choose_target([info(25, "suspect")], 30, good_only=False) is None
    assert choose_target([], 30) is None


def test_a_state_that_has_passed_the_window_is_no_target() -> None:
    assert choose_target([info(10), info(20, cursor=999)], 30, cursor=320) == info(10)


def test_a_candidate_is_confirmed_by_enough_healthy_steps() -> None:
    infos = [info(10, "candidate"), info(20, "candidate"), info(5), info(8, "suspect")]
    assert find_confirmed(infos, healthy_through=17, confirm=8) == []
    assert find_confirmed(infos, healthy_through=18, confirm=8) == [infos[0]]
    assert find_confirmed(infos, healthy_through=28, confirm=8) == infos[:2]
    assert find_confirmed(infos, healthy_through=20, confirm=0) == infos[:2]


def test_an_incident_is_over_after_confirm_healthy_steps_from_its_last_finding_on() -> None:
    incidents = Incidents(confirm=3)
    assert incidents.note_healthy(1) == (None, "")
    assert incidents.note_anomaly(10, 9) == (1, "open")
    assert incidents.note_anomaly(10, 8) == (1, "")
    assert incidents.onset == 8
    # The run goes back to step 5: what is run again proves nothing.
    assert [incidents.note_healthy(step) for step in range(6, 12)] == [(1, "")] * 6
    assert incidents.note_healthy(12) == (1, "recovered")
    assert incidents.note_healthy(13) == (None, "")
    assert incidents.note_anomaly(14, 14) == (2, "open")


def test_incidents_go_on_after_a_crash() -> None:
    incidents = Incidents(confirm=2)
    incidents.resume(4, is_open=True, onset=90, step=100)
    assert incidents.note_anomaly(95, 95) == (4, "")
    assert [incidents.note_healthy(step) for step in (98, 99, 100, 101)] == [(4, "")] * 3 + [
        (4, "recovered")
    ]
    incidents = Incidents(confirm=2)
    incidents.resume(4)
    assert incidents.note_anomaly(95, 95) == (5, "open")
