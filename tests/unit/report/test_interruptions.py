"""Failed ranks, disk problems and restarts, under the names of lines of old and of new journals."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardrail.report.build import build_report
from guardrail.report.table_rows import make_rows
from guardrail.rundir.run_directory import RunDirectory

GONE = "rank 1 is gone"  # a message of a supervisor


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.create(tmp_path, "demo", "")
    run.append("started", world=2, samples=100, order_seed=7, host="vm")
    return run


@pytest.mark.parametrize("kind", ["ranks_failed", "rank_failed", "hung", "rank_hung"])
def test_a_failed_rank_is_a_row_with_its_restart(run: RunDirectory, kind: str) -> None:
    run.append(kind, f"{GONE} on vm", step=9, rank=1, host="vm", log="logs/rank-1.log")
    run.append("restarted", step=5, timeline=1)
    report = build_report(run)
    (fault,) = report.faults
    assert fault.kind == ("rank hung" if "hung" in kind else "rank failed")
    assert (fault.rank, fault.log, fault.resolved_step) == (1, "logs/rank-1.log", 5)
    assert fault.seconds >= 0.0 and report.restarts[0].after == "failure"
    (row,) = make_rows(report)
    assert (row.step, row.what, row.action.split()[-1]) == (9, GONE, "5")
    assert report.troubles == (f"{GONE} on vm",)


def test_a_process_that_hung_before_it_had_a_rank_is_not_rank_0(run: RunDirectory) -> None:
    run.append("rank_hung", "process 41 has made no progress for 9 s", step=9, rank=None)
    (fault,) = build_report(run).faults
    assert (fault.kind, fault.rank) == ("rank hung", -1)


def test_a_rank_that_fails_again_after_a_restart_is_another_row(run: RunDirectory) -> None:
    for timeline in (1, 2):
        run.append("rank_failed", GONE, step=9, rank=1)
        run.append("rank_failed", GONE, step=9, rank=1)
        run.append("restarted", step=5, timeline=timeline)
    run.append("rank_failed", GONE, step=9, rank=1)
    rows = make_rows(build_report(run))
    assert [fault.count for fault in build_report(run).faults] == [2, 2, 1]
    assert [row.urgent for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    ("kind", "bad"), [("durability", "degraded"), ("disk", "failing")], ids=["old", "new"]
)
def test_a_disk_that_failed_has_the_step_that_came_before(
    run: RunDirectory, kind: str, bad: str
) -> None:
    run.append("eval", step=7, loss=2.0)
    run.append(kind, "no space", state=bad, reason="no space")
    assert build_report(run).faults[0].resolved_step is None
    run.append("eval", step=12, loss=2.0)
    run.append(kind, "metrics can be written again", state="ok")
    (fault,) = build_report(run).faults
    assert (fault.kind, fault.step, fault.resolved_step) == ("disk failing", 7, 12)


def test_a_checkpoint_that_failed_is_put_right_by_the_next(run: RunDirectory) -> None:
    for step in (10, 20):
        run.append("checkpoint", step=step, path="", state="failed", reason="No space left")
    assert build_report(run).faults[0].resolved_step is None
    run.append("checkpoint", step=30, path="step-30", state="candidate", cp_step=30)
    (fault,) = build_report(run).faults
    assert (fault.kind, fault.count, fault.resolved_step) == ("checkpoint failed", 2, 30)


@pytest.mark.parametrize(("phase", "after"), [("stopped", "stopped"), ("", "ended"), (None, "")])
def test_a_resumed_run_says_how_it_had_ended(
    run: RunDirectory, phase: str | None, after: str
) -> None:
    if phase is not None:
        run.append("ended", step=5, phase=phase)
    run.append("restarted", step=5, timeline=1)
    assert [restart.after for restart in build_report(run).restarts] == [after]


def test_lines_have_old_and_new_names(tmp_path: Path) -> None:
    reports = []
    for skipped, diagnosis, state in (
        ("left_out", "cause", "offset"),
        ("skipped", "diagnosis", "recovered with higher loss"),
    ):
        run = RunDirectory.create(tmp_path, "demo", "")
        run.append("started", samples=100, order_seed=7)
        run.append("verdict", step=4, action="skip", incident=1, batch=[8, 12])
        span = {"first": 8, "last": 12, "cause": "rejected", "step": 5}
        run.append(skipped, step=4, span=span, incident=1)
        run.append(diagnosis, step=4, incident=1, cause="data", reason="loss 5 comes again")
        run.append("incident", step=9, number=1, state=state, onset=5)
        reports.append(build_report(run))
    old, new = (report.incidents[0] for report in reports)
    assert old.samples == new.samples == 4 and old.actions[0].samples_skipped == 4
    assert old.cause == new.cause == "data" and old.evidence == new.evidence
    assert old.closed is not None and new.closed is not None
    assert [report.samples_skipped for report in reports] == [4, 4]
    rows = [make_rows(report)[0] for report in reports]
    assert rows[0].result == rows[1].result and rows[0].urgent == rows[1].urgent
