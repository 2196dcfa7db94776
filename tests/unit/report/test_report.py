"""The report says what the journal says, of any run."""

from __future__ import annotations

import json
import math
import re
import socket
import time
from pathlib import Path

import msgspec
import pytest

from guardrail.core.events.decisions import HIGHER_LOSS
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Action
from guardrail.report.build import build_report
from guardrail.report.model import Report
from guardrail.report.output import (
    commands_text,
    incident_text,
    report_as_dict,
    summary_text,
)
from guardrail.report.quarantine import quarantine_lines
from guardrail.report.summary import describe_commands
from guardrail.report.table_rows import describe_actions
from guardrail.rundir.run_directory import RunDirectory
from tests.support.findings import make_finding
from tests.support.report_runs import (
    finished,
    rows,
    spike,
    start,
)


def test_a_finished_run_with_an_incident(run: RunDirectory) -> None:
    finished(run)
    report = build_report(run)
    assert (report.state, report.exit_code, report.reason, report.step) == (
        "finished",
        0,
        "all done",
        6,
    )
    assert (report.world, report.timeline, report.applied, report.rejected) == (2, 1, 6, 0)
    assert report.loss == 8.0 and report.samples_skipped == 12
    (incident,) = report.incidents
    assert (incident.number, incident.state, incident.onset) == (1, "recovered", 5)
    assert incident.closed is not None and incident.closed >= incident.opened
    assert [(f.signal, f.value, f.score) for f in incident.findings] == [
        ("loss", 12.5, 42.2),
        ("grad_norm", 11.5, 20),
    ]
    assert [action.action for action in incident.actions] == ["skip", "skip", "rollback"]
    rollback = incident.actions[-1]
    assert (rollback.to_step, rollback.tier, rollback.steps_lost, rollback.window) == (
        2,
        "memory",
        2,
        (36, 48),
    )
    assert (incident.samples, incident.documents_total, len(incident.documents)) == (12, 5, 2), (
        "nothing counts twice"
    )
    assert incident.documents[0].excerpt == "Ã‚Â Ã‚Â" and incident.documents[0].record == 12
    assert [(c.name, c.step, c.state, c.bytes) for c in report.checkpoints] == [
        ("step-00000000", 0, "good", 900),
        ("step-00000002", 2, "good", 41_000_000),
        ("", 5, "failed", 0),
    ]
    (command,) = report.commands
    assert (command.command, command.value, command.who, command.step) == ("lr", 0.5, "me@host", 6)


def test_the_summary_has_a_line_for_each_part(run: RunDirectory) -> None:
    finished(run)
    lines = summary_text(run).splitlines()
    assert lines[0].startswith(f"{run.name}: finished, 6 of 6 steps")
    for numbers in (
        ("loss", "8"),
        ("1 incident", "1 rollback", "12 samples skipped"),
        ("1", "5", "loss 2.31 -> 12.5", "restored 2", "12 skipped"),
        ("Checkpoints", "step 2", "also good 0", "1 save failed", "41 MB"),
        ("1 command", "--commands"),
        ("guardrail report", "--incident 1"),
        ("guardrail report", "--quarantine"),
    ):
        assert any(all(part.lower() in line.lower() for part in numbers) for line in lines), numbers


def test_one_incident_is_a_paragraph_and_tables(run: RunDirectory) -> None:
    finished(run)
    said = incident_text(run, 1)
    titles = ("Signals", "Decisions", "Documents")
    assert [line.split(" (")[0] for line in said.splitlines() if line.startswith(titles)] == [
        *titles
    ]
    rows = [line.split() for line in said.splitlines()]
    assert ["loss", "5", "12.5", "2.31", "42.2", "8"] in rows
    assert ["/data/0037.txt", "(1", "record)", "80", "-"] in rows
    assert any(row[:3] == ["3", "4", "36-47"] and "2" in row for row in rows), "the rollback"
    assert "only 2 of the 5 documents" in said
    assert "Ã‚Â" not in said and "Ã‚Â" in incident_text(run, 1, excerpts=True)


def test_commands_are_listed_on_demand(run: RunDirectory) -> None:
    finished(run)
    rows = [line.split() for line in commands_text(run).splitlines()]
    assert ["6", "lr", "0.5", "me@host", "applied"] in rows


def test_json_is_the_full_report_and_strict(run: RunDirectory) -> None:
    finished(run)
    run.append(
        "verdict",
        step=9,
        action="skip",
        findings=[make_finding(9, value=math.nan, score=math.inf)],
        incident=2,
    )
    written = json.loads(json.dumps(report_as_dict(run), allow_nan=False))
    assert written["incidents"][1]["findings"][0]["value"] == "nan"
    assert written["incidents"][1]["findings"][0]["score"] == "inf"
    assert set(written) == {field for field in Report.__struct_fields__}


# -- runs in every condition


def test_a_young_a_running_a_dead_and_an_ended_run(run: RunDirectory, tmp_path: Path) -> None:
    assert build_report(run).state == "new" and "No incidents." in summary_text(run).splitlines()
    run.append("note", "x")
    assert build_report(run).state == "new"
    start(run)
    here = socket.gethostname()
    status = Status(
        run=run.name, phase=Phase.STEP, step=3, host=here, heartbeat=time.time(), total_steps=9
    )
    run.write_status(status)
    assert build_report(run).state == "running"
    run.write_status(msgspec.structs.replace(status, heartbeat=time.time() - 7200))
    assert build_report(run).state == "lost" and "--resume" in summary_text(run)
    with run.lock("trainer"):
        assert build_report(run).state == "running", (
            "the trainer lives, whatever became of its heartbeat"
        )
    last_words = "halted: no budget left"
    run.append("ended", last_words, phase="halted", exit_code=3, step=3)
    report = build_report(run)
    assert (report.state, report.exit_code, report.reason) == ("halted", 3, last_words)
    run.append("restarted", "continues at step 2", step=2, timeline=1, checkpoint="step-00000002")
    assert build_report(run).state == "lost", "what was said before a restart is no last word"
    (run.path / "config.toml").unlink()
    assert (
        build_report(run).state == "lost"
        and build_report(RunDirectory(tmp_path / "nothing")).state == "new"
    )


def test_restarts_say_what_was_made_again(run: RunDirectory) -> None:
    start(run)
    rows(run, 1, 2, 3, 4, 5)
    rows(run, 6, verdict=Action.SKIP)
    run.append("rank_failed", "rank 1 was killed by SIGKILL", step=5, rank=1, exit=-9, host="h")
    run.append("restarted", "continues at step 2", step=2, timeline=1, checkpoint="step-00000002")
    order = "the sample order is another one"
    run.append("resume_check", step=2, timeline=1, schedule="ok", data=order)
    rows(run, 3, timeline=1)
    run.append("restarted", "continues at step 2", step=2, timeline=2, checkpoint="step-00000002")
    first, second = build_report(run).restarts
    assert (first.step, first.checkpoint, first.steps_lost) == (2, "step-00000002", 3)
    assert first.differs == (f"data: {order}",) and second.differs == ()
    assert second.steps_lost == 1
    (fault,) = build_report(run).faults
    assert (fault.kind, fault.rank, fault.resolved_step) == ("rank failed", 1, 2)
    said = summary_text(run)
    assert "3 steps repeated" in said and fault.message in said and first.differs[0] in said


def test_an_open_incident_and_one_that_is_only_advised(run: RunDirectory) -> None:
    start(run)
    run.append(
        "verdict",
        "step 4: would skip",
        step=3,
        action="apply",
        would="skip",
        findings=[make_finding(4)],
    )
    run.append(
        "verdict",
        "step 5: would roll back",
        step=4,
        action="apply",
        would="rollback",
        findings=[make_finding(5)],
    )
    run.append("verdict", "step 90: skip", step=89, action="skip", findings=[make_finding(90)])
    close, far = build_report(run).incidents
    assert close.number == far.number == 0 and close.state == "open"
    assert [action.action for action in close.actions] == ["would skip", "would rollback"]
    assert (close.onset, far.onset) == (4, 90)
    rows = [line.split() for line in summary_text(run).splitlines()]
    assert any(row[:1] == ["4"] for row in rows) and any(row[:1] == ["90"] for row in rows)


def test_an_incident_may_get_its_number_after_its_first_verdict(run: RunDirectory) -> None:
    start(run)
    run.append("verdict", "step 4: skip", step=3, action="skip", findings=[make_finding(4)])
    run.append("incident", "incident 1: open", step=3, number=1, state="open", onset=4)
    run.append("incident", "incident 1: recovered", step=20, number=1, state="recovered")
    (incident,) = build_report(run).incidents
    assert incident.number == 1 and incident.state == "recovered" and len(incident.findings) == 1


def test_the_ranks_and_parameters_of_a_bad_gradient_are_named(run: RunDirectory) -> None:
    start(run)
    bad = make_finding(
        4, signal="grad_norm", kind=FindingKind.NONFINITE, value=math.inf, ranks=(1,)
    )
    parameters = {"1": ["blocks.3.mlp.weight"]}
    run.append(
        "verdict", "s", step=3, action="skip", findings=[bad], incident=1, parameters=parameters
    )
    (incident,) = build_report(run).incidents
    assert incident.parameters == parameters and incident.findings[0].ranks == (1,)
    said = incident_text(run, 1)
    assert "rank 1" in said and parameters["1"][0] in said


def test_only_the_ranks_that_a_finding_names_are_shown(run: RunDirectory) -> None:
    """The reduction hands the NaN of one rank to all."""
    start(run)
    bad = make_finding(
        4, signal="grad_norm", kind=FindingKind.NONFINITE, value=math.nan, ranks=(1,)
    )
    parameters = {"0": ["norm.weight"], "1": ["norm.weight"]}
    run.append(
        "verdict", "s", step=3, action="skip", findings=[bad], incident=1, parameters=parameters
    )
    said = incident_text(run, 1)
    assert "rank 1: norm.weight" in said and "rank 0" not in said
    assert build_report(run).incidents[0].parameters == parameters


def test_what_a_user_asked_for_is_no_incident(run: RunDirectory) -> None:
    start(run)
    span = Span(first=0, last=8, origin="user", step=3, batches=2)
    run.append("skipped", "asked for", step=3, span=span, samples=8, incident=None)
    report = build_report(run)
    assert report.incidents == () and report.samples_skipped == 8
    assert [(one.action, one.step, one.window) for one in report.by_person] == [("skip", 3, (0, 8))]
    (line,) = (line for line in summary_text(run).splitlines() if "--commands" in line)
    assert re.findall(r"(\d+) (\w+)", line) == [("1", "skip")]
    assert "0-7" in commands_text(run)


# -- what it cost, and how it went on


def test_what_an_incident_cost_is_what_its_rows_measured(run: RunDirectory) -> None:
    start(run)
    rows(run, 1, 2, 3, 4, step_time=2.0)
    spike(run)  # two tries of step 5; steps 3 and 4 are discarded
    rows(run, 3, 4, 5, timeline=1, step_time=7.0)
    run.append("paused", "asks", step=5, timeline=1, incident=1, proposals=[{"action": "rollback"}])
    run.append("resumed", "goes on", step=5, timeline=1)
    (incident,) = build_report(run).incidents
    assert (incident.cost.steps, incident.cost.rejected, incident.cost.seconds) == (2, 2, 4.0)
    waited = [event.time for event in run.events() if event.kind in ("paused", "resumed")]
    assert incident.cost.parked == waited[1] - waited[0]
    assert incident.cost.total_seconds == 4.0 + incident.cost.parked
    assert build_report(run).seconds_lost == incident.cost.total_seconds
    (cost,) = [line for line in incident_text(run, 1).splitlines() if "Cost:" in line]
    for number in ("2 steps", "2 updates", "12 samples", "4 s"):
        assert number in cost


def test_cause_remedies_samples_and_outcome_are_shown(run: RunDirectory) -> None:
    start(run)
    spike(run)
    run.append(
        "diagnosis",
        "replayed",
        step=4,
        incident=1,
        cause="hardware or nondeterminism",
        reason="loss 1 and 2",
        rank=1,
    )
    remedy = {"kind": "lr", "value": 0.5, "from_step": 3, "hold": 10, "back": 20}
    run.append(
        "remedy",
        "remedies",
        step=2,
        timeline=1,
        incident=1,
        remedies=[remedy, {"kind": "moments", "from_step": 3}],
    )
    odd = {
        "position": 41,
        "id": 7,
        "loss": 9.5,
        "share": 0.8,
        "excerpt": "ÿÿÿÿ",
        "odd": ["62 % symbols"],
    }
    span = Span(first=60, last=64, origin="rejected", step=5, positions=(61,))
    run.append("skipped", "one sample", step=4, timeline=1, incident=1, span=span, samples=[odd])
    run.append(
        "incident",
        "incident 1: offset: loss 2.4 against 2.31",
        number=1,
        state=HIGHER_LOSS,
        onset=5,
        expected=2.31,
    )
    (incident,) = build_report(run).incidents
    expected = (HIGHER_LOSS, {"expected": 2.31}, 13)
    assert (incident.state, incident.measured, incident.samples) == expected
    assert incident.closed is not None
    assert (incident.cause, incident.cause_rank) == ("not reproducible", 1)
    assert incident.actions[-1].action == "remedy" and len(incident.actions[-1].remedies) == 2
    assert (incident.named[0].position, incident.named[0].odd) == (41, ("62 % symbols",))
    assert describe_actions(incident).endswith("13 skipped, rate x0.5, moments reset")
    said = " ".join(incident_text(run, 1).split())
    for part in ("on rank 1", "learning rate x 0.5", "10 steps", "20 steps", "62 % symbols"):
        assert part in said, f"{part!r} is not in\n{said}"


def test_what_was_undone_is_no_longer_skipped(run: RunDirectory) -> None:
    finished(run)
    undone = [event.data["span"] for event in run.events() if event.kind in ("skipped", "rollback")]
    data = {
        "to_step": 2,
        "from_step": 6,
        "new_timeline": 2,
        "rollbacks": [1],
        "pardons": [[36, 48]],
        "lines": [4],
    }
    run.append("undo", "line 9 undone", step=6, timeline=1, spans=undone, incident=1, **data)
    report = build_report(run)
    assert report.samples_skipped == 0 and quarantine_lines(run) == []
    assert report.incidents[0].samples == 0 and report.incidents[0].actions[-1].action == "undo"
    assert "undo" in summary_text(run) and "step 6: undo, restored step 2" in commands_text(run)


@pytest.mark.parametrize(
    ("effects", "said"),
    [
        (["refused", "refused"], "Also: 2 commands (list them with --commands)."),
        (["refused", "applied"], "Also: 2 commands, 1 undo (list them with --commands)."),
    ],
)
def test_only_an_undo_that_took_effect_is_counted(
    run: RunDirectory, effects: list[str], said: str
) -> None:
    start(run)
    for number, effect in enumerate(effects):
        run.append("command", id=str(number), command="undo", effect=effect)
    assert describe_commands(build_report(run)) == said
