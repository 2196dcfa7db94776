"""The report says what the journal says, of any run, and its quarantine is the run's own."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from guardrail.cli.main import main
from guardrail.core.errors import RunDirectoryError, UsageError
from guardrail.core.records import Action, Finding, FindingKind, Mode, Phase, Severity, Span, Status
from guardrail.decide.sample_order import Quarantine, SampleCursor, SampleOrder
from guardrail.report.build import build
from guardrail.report.model import Report
from guardrail.report.output import as_dict, commands_text, incident_text, text, written
from guardrail.report.quarantine import quarantine_lines
from guardrail.report.text_chart import sketch
from guardrail.rundir.run_directory import RunDirectory
from tests.support.lab import without_waiting

DOCUMENT = {
    "path": "/data/0037.txt",
    "record": 12,
    "first_byte": 10,
    "last_byte": 90,
    "excerpt": "Ã‚Â Ã‚Â",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "demo", "[data]\nquarantine = ''\n")


def finding(step: int, **changes: Any) -> Finding:
    values = {
        "signal": "loss",
        "kind": FindingKind.LOSS_SPIKE,
        "severity": Severity.REJECT,
        "value": 11.5,
        "baseline": 2.31,
    }
    return Finding(
        **{**values, "step": step, "score": 41.2, "threshold": 8.0, "onset": step, **changes}
    )


def rows(
    run: RunDirectory,
    *steps: int,
    timeline: int = 0,
    verdict: Action = Action.APPLY,
    **values: float,
) -> None:
    with run.metrics_writer() as writer:
        for step in steps:
            row = {
                "step": step,
                "timeline": timeline,
                "loss": 2.0 + step,
                "verdict": list(Action).index(verdict),
            }
            writer.append(row | values)


def start(run: RunDirectory, samples: int = 100, **data: Any) -> None:
    run.append(
        "started",
        "training begins on 2 ranks",
        world=2,
        samples=samples,
        order_seed=7,
        shuffled=True,
        **data,
    )


def spike(run: RunDirectory, *, number: int = 1, step: int = 5, first: int = 40) -> None:
    """Two batches of four rejected at `step`, then a rollback to `step - 3` that leaves out one
    more before them.
    """
    for n in range(2):
        span = Span(
            first=first + 4 * n, last=first + 4 * n + 4, cause="rejected", step=step, reason="loss"
        )
        rows(run, step, verdict=Action.SKIP)
        run.append(
            "verdict",
            f"step {step}: skip: loss 11.50 against 2.31",
            step=step - 1,
            action="skip",
            findings=[
                finding(step, value=11.5 + n, score=41.2 + n),
                finding(step, signal="grad_norm", score=20.0),
            ],
            incident=number,
        )
        if not n:
            run.append(
                "incident",
                f"incident {number}: open",
                step=step - 1,
                number=number,
                state="open",
                onset=step,
            )
        run.append(
            "left_out",
            step=step - 1,
            span=span,
            incident=number,
            documents=[DOCUMENT],
            documents_total=2,
            samples=4,
        )
    run.append(
        "verdict", f"step {step}: rollback", step=step - 1, action="rollback", incident=number
    )
    run.append(
        "rollback",
        f"rolled back from step {step - 1} to {step - 3}",
        step=step - 1,
        to_step=step - 3,
        from_step=step - 1,
        onset=step,
        window=[first - 4, first + 8],
        tier="memory",
        new_timeline=1,
        incident=number,
        span=Span(first=first - 4, last=first + 8, cause="rollback", step=step, batches=3),
        documents=[DOCUMENT, {"path": "/data/0038.txt"}],
        documents_total=5,
    )


def finished(run: RunDirectory) -> None:
    start(run)
    rows(run, 1, 2, 3, 4)
    run.append("checkpoint", path="step-00000000", state="good", cp_step=0, bytes=900, step=1)
    run.append(
        "checkpoint", path="step-00000002", state="candidate", cp_step=2, bytes=41_000_000, step=2
    )
    spike(run)
    rows(run, 3, 4, 5, 6, timeline=1)
    run.append("checkpoint", path="step-00000002", state="good", cp_step=2, step=4, timeline=1)
    run.append(
        "checkpoint", path="", state="failed", reason="No space left on device", step=5, timeline=1
    )
    run.append("incident", "incident 1: recovered", step=6, timeline=1, number=1, state="recovered")
    answer = {
        "id": "a",
        "command": "lr",
        "value": 0.5,
        "who": "me@host",
        "effect": "applied",
        "reason": "",
    }
    run.append("command", "lr applied", step=6, timeline=1, **answer)
    run.append(
        "ended",
        "finished at step 6: all steps made",
        step=6,
        timeline=1,
        phase="finished",
        reason="all done",
    )
    run.write_status(
        Status(
            run=run.name, phase=Phase.FINISHED, step=6, total_steps=6, exit_code=0, mode=Mode.AUTO
        )
    )


def test_a_finished_run_with_an_incident(run: RunDirectory) -> None:
    finished(run)
    report = build(run)
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
    lines = text(run).splitlines()
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
    assert "names 2 of 5 documents" in said
    assert "Ã‚Â" not in said and "Ã‚Â" in incident_text(run, 1, excerpts=True)


def test_commands_are_listed_on_demand(run: RunDirectory) -> None:
    finished(run)
    rows = [line.split() for line in commands_text(run).splitlines()]
    assert ["6", "lr", "0.5", "me@host", "applied"] in rows


def test_json_is_the_whole_report_and_strict(run: RunDirectory) -> None:
    finished(run)
    run.append(
        "verdict",
        step=9,
        action="skip",
        findings=[finding(9, value=math.nan, score=math.inf)],
        incident=2,
    )
    told = json.loads(json.dumps(as_dict(run), allow_nan=False))
    assert told["incidents"][1]["findings"][0]["value"] == "nan"
    assert told["incidents"][1]["findings"][0]["score"] == "inf"
    assert set(told) == {field for field in Report.__struct_fields__}


# -- runs in every condition


def test_a_young_a_running_a_dead_and_an_ended_run(run: RunDirectory, tmp_path: Path) -> None:
    assert build(run).state == "new" and "No incidents." in text(run).splitlines()
    run.append("note", "x")
    assert build(run).state == "new"
    start(run)
    here = socket.gethostname()
    status = Status(
        run=run.name, phase=Phase.STEP, step=3, host=here, heartbeat=time.time(), total_steps=9
    )
    run.write_status(status)
    assert build(run).state == "running"
    run.write_status(msgspec.structs.replace(status, heartbeat=time.time() - 7200))
    assert build(run).state == "lost" and "--resume" in text(run)
    with run.lock("trainer"):
        assert build(run).state == "running", "the trainer lives, whatever became of its heartbeat"
    run.append("ended", "halted: no budget left", phase="halted", exit_code=3, step=3)
    report = build(run)
    assert (report.state, report.exit_code, report.reason) == (
        "halted",
        3,
        "halted: no budget left",
    )
    run.append("restarted", "continues at step 2", step=2, timeline=1, checkpoint="step-00000002")
    assert build(run).state == "lost", "what was said before a restart is no last word"
    (run.path / "config.toml").unlink()
    assert build(run).state == "lost" and build(RunDirectory(tmp_path / "nothing")).state == "new"


def test_restarts_say_what_was_made_again(run: RunDirectory) -> None:
    start(run)
    rows(run, 1, 2, 3, 4, 5)
    rows(run, 6, verdict=Action.SKIP)
    run.append("ranks_failed", "rank 1 was killed by SIGKILL", step=5, rank=1, exit=-9, host="h")
    run.append("restarted", "continues at step 2", step=2, timeline=1, checkpoint="step-00000002")
    run.append(
        "resume_check", step=2, timeline=1, schedule="ok", data="the sample order is another one"
    )
    rows(run, 3, timeline=1)
    run.append("restarted", "continues at step 2", step=2, timeline=2, checkpoint="step-00000002")
    first, second = build(run).restarts
    assert (first.step, first.checkpoint, first.steps_lost) == (2, "step-00000002", 3)
    assert first.differs == ("data: the sample order is another one",) and second.differs == ()
    assert second.steps_lost == 1
    (fault,) = build(run).faults
    assert (fault.kind, fault.rank, fault.resolved_step) == ("rank failed", 1, 2)
    told = text(run)
    assert "3 steps repeated" in told and fault.message in told and first.differs[0] in told


def test_an_open_incident_and_one_that_is_only_advised(run: RunDirectory) -> None:
    start(run)
    run.append(
        "verdict", "step 4: would skip", step=3, action="apply", would="skip", findings=[finding(4)]
    )
    run.append(
        "verdict",
        "step 5: would roll back",
        step=4,
        action="apply",
        would="rollback",
        findings=[finding(5)],
    )
    run.append("verdict", "step 90: skip", step=89, action="skip", findings=[finding(90)])
    close, far = build(run).incidents
    assert close.number == far.number == 0 and close.state == "open"
    assert [action.action for action in close.actions] == ["would skip", "would rollback"]
    assert (close.onset, far.onset) == (4, 90)
    rows = [line.split() for line in text(run).splitlines()]
    assert any(row[:1] == ["4"] for row in rows) and any(row[:1] == ["90"] for row in rows)


def test_an_incident_may_get_its_number_after_its_first_verdict(run: RunDirectory) -> None:
    start(run)
    run.append("verdict", "step 4: skip", step=3, action="skip", findings=[finding(4)])
    run.append("incident", "incident 1: open", step=3, number=1, state="open", onset=4)
    run.append("incident", "incident 1: recovered", step=20, number=1, state="recovered")
    (incident,) = build(run).incidents
    assert incident.number == 1 and incident.state == "recovered" and len(incident.findings) == 1


def test_the_ranks_and_parameters_of_a_bad_gradient_are_named(run: RunDirectory) -> None:
    start(run)
    bad = finding(4, signal="grad_norm", kind=FindingKind.NONFINITE, value=math.inf, ranks=(1,))
    parameters = {"1": ["blocks.3.mlp.weight"]}
    run.append(
        "verdict", "s", step=3, action="skip", findings=[bad], incident=1, parameters=parameters
    )
    (incident,) = build(run).incidents
    assert incident.parameters == parameters and incident.findings[0].ranks == (1,)
    said = incident_text(run, 1)
    assert "rank 1" in said and parameters["1"][0] in said


def test_only_the_ranks_that_a_finding_names_are_shown(run: RunDirectory) -> None:
    """The reduction hands the NaN of one rank to all."""
    start(run)
    bad = finding(4, signal="grad_norm", kind=FindingKind.NONFINITE, value=math.nan, ranks=(1,))
    parameters = {"0": ["norm.weight"], "1": ["norm.weight"]}
    run.append(
        "verdict", "s", step=3, action="skip", findings=[bad], incident=1, parameters=parameters
    )
    said = incident_text(run, 1)
    assert "rank 1: norm.weight" in said and "rank 0" not in said
    assert build(run).incidents[0].parameters == parameters


def test_what_a_person_asked_for_is_no_incident(run: RunDirectory) -> None:
    start(run)
    span = Span(first=0, last=8, cause="user", step=3, batches=2)
    run.append(
        "left_out", "samples left out: asked for", step=3, span=span, samples=8, incident=None
    )
    report = build(run)
    assert report.incidents == () and report.samples_skipped == 8
    assert [(one.action, one.step, one.window) for one in report.by_person] == [("skip", 3, (0, 8))]
    assert "1 skip by command" in text(run) and "positions 0-7" in commands_text(run)


# -- what comes from outside


def test_journals_full_of_nonsense_do_not_break_the_report(run: RunDirectory) -> None:
    generator = random.Random(0)
    values = [
        None,
        -1,
        0,
        3,
        2.5,
        "nan",
        "x",
        [],
        [1],
        [1, 2],
        [None],
        {},
        {"a": 1},
        True,
        10**30,
        "\x1b[2J",
        [{}],
        1e300,
    ]
    keys = """action would findings onset window span documents documents_total samples incident number state to_step
        from_step new_timeline tier parameters id command value who effect reason path cp_step bytes phase exit_code
        checkpoint order_seed shuffled world host loss schedule""".split()
    kinds = """started restarted resume_check finding verdict left_out rollback incident command checkpoint durability
        eval paused resumed note hung ranks_failed ended future""".split()
    for n in range(1500):
        data = {key: generator.choice(values) for key in generator.sample(keys, 12)}
        line = {
            "seq": n + 1,
            "time": float(n),
            "step": generator.randrange(99),
            "timeline": generator.randrange(4),
        }
        line |= {
            "kind": generator.choice(kinds),
            "message": generator.choice(["", "m", "\x1b]0;t\x07"]),
        }
        with run.journal_path.open("a") as file:
            file.write(json.dumps(line | data) + "\n")
        if n % 100 == 99:
            as_dict(run)
            assert_harmless(text(run))


def assert_harmless(told: str) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", told)


def test_no_control_character_of_a_document_reaches_the_terminal(run: RunDirectory) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e[/red]\n"
    start(run, host=evil)
    document = {"path": evil, "excerpt": evil}
    span = Span(first=0, last=4, cause="rejected", step=1, reason=evil)
    bad = finding(2, signal=evil)
    run.append(
        "verdict",
        evil,
        step=1,
        action="skip",
        findings=[bad],
        incident=1,
        parameters={evil: [evil]},
    )
    run.append("left_out", evil, step=1, span=span, documents=[document], incident=1)
    run.append("command", evil, id=evil, command=evil, who=evil, effect=evil, reason=evil)
    run.append("checkpoint", evil, path=evil, state=evil, reason=evil)
    run.append("restarted", evil, step=1, timeline=1, checkpoint=evil)
    run.append("resume_check", evil, schedule=evil)
    run.append("hung", evil)
    run.append("ended", evil, phase=evil, reason=evil)
    told = text(run)
    assert_harmless(told)
    assert "[/red]" in told
    for other in (incident_text(run, 1, excerpts=True), commands_text(run)):
        assert_harmless(other)


# -- quarantine


@pytest.mark.parametrize("shuffled", [True, False])
def test_the_quarantine_is_what_the_ledger_held(
    run: RunDirectory, tmp_path: Path, shuffled: bool
) -> None:
    file = tmp_path / "known.txt"
    file.write_text("# found before\n3\n\n17@1\n")
    run.write_config(f"[data]\nquarantine = {json.dumps(str(file))}\n")
    order = SampleOrder(samples=23, seed=5, shuffled=shuffled)
    ledger = SampleCursor(order, batch_size=4)
    ledger.quarantine.read(file.read_text().splitlines())
    run.append("started", samples=23, order_seed=5, shuffled=shuffled)
    spans = [
        Span(first=8, last=12, cause="rejected", step=2),
        Span(first=21, last=27, cause="rollback", step=4),  # across the end of an epoch
        Span(first=60, last=71, cause="user", step=9),
    ]
    for span in spans:
        ledger.leave_out(span)
    run.append("left_out", span=spans[0])
    run.append("rollback", span=spans[1], to_step=3, new_timeline=1)
    run.append("left_out", span=spans[1])
    run.append("left_out", span=spans[2])
    lines = quarantine_lines(run)
    assert (
        lines == list(ledger.quarantine.lines())
        and len(lines) > 12
        and any("@" in line for line in lines)
    )
    again = Quarantine()
    again.read(lines)
    assert list(again.lines()) == lines
    run.append("left_out", broken="line", span={"first": "x"})
    assert quarantine_lines(run) == lines


def test_a_run_that_left_nothing_out_has_the_quarantine_of_its_file(
    run: RunDirectory, tmp_path: Path
) -> None:
    assert quarantine_lines(run) == []
    file = tmp_path / "known.txt"
    file.write_text("5\n1@2\n")
    run.write_config(f"[data]\nquarantine = {json.dumps(str(file))}\n")
    assert quarantine_lines(run) == ["1@2", "5"]


def test_a_quarantine_that_would_not_be_complete_is_refused(
    run: RunDirectory, tmp_path: Path
) -> None:
    run.append("left_out", span=Span(first=0, last=4, cause="rejected", step=1))
    with pytest.raises(RunDirectoryError, match="order"):
        quarantine_lines(run)
    assert build(run).samples_skipped == -1 and "samples were skipped" in text(run).lower()
    start(run)
    file = tmp_path / "gone.txt"
    run.write_config(f"[data]\nquarantine = {json.dumps(str(file))}\n")
    with pytest.raises(RunDirectoryError, match="gone"):
        quarantine_lines(run)
    file.write_text("5\nfive\n")
    with pytest.raises(UsageError, match="line 2"):
        quarantine_lines(run)


def test_the_report_writes_nothing(run: RunDirectory) -> None:
    finished(run)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    build(run), text(run), as_dict(run), quarantine_lines(run)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_note_by_itself_is_no_incident(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "noted", "")
    finding = {
        "signal": "grad_norm", "step": 21, "kind": "grad_spike", "severity": "note", "value": 15.9, "baseline": 2.4,
        "score": 9.5, "threshold": 12.0, "onset": 21,
    }  # fmt: skip
    run.append(
        "finding",
        "step 21: noted",
        step=20,
        action="apply",
        would=None,
        findings=[finding],
        incident=None,
    )
    assert build(run).incidents == ()


# -- what it cost, and how it went on


def test_what_an_incident_cost_is_what_its_rows_measured(run: RunDirectory) -> None:
    start(run)
    rows(run, 1, 2, 3, 4, step_time=2.0)
    spike(run)  # two tries of step 5; steps 3 and 4 are given up
    rows(run, 3, 4, 5, timeline=1, step_time=7.0)
    run.append("paused", "asks", step=5, timeline=1, incident=1, proposals=[{"action": "rollback"}])
    run.append("resumed", "goes on", step=5, timeline=1)
    (incident,) = build(run).incidents
    assert (incident.cost.steps, incident.cost.rejected, incident.cost.seconds) == (2, 2, 4.0)
    waited = [event.time for event in run.events() if event.kind in ("paused", "resumed")]
    assert incident.cost.parked == waited[1] - waited[0]
    assert incident.cost.total_seconds == 4.0 + incident.cost.parked
    assert build(run).seconds_lost == incident.cost.total_seconds
    (cost,) = [line for line in incident_text(run, 1).splitlines() if "Cost:" in line]
    for number in ("2 steps", "2 updates", "12 samples", "4 s"):
        assert number in cost


def test_cause_remedies_samples_and_outcome_are_shown(run: RunDirectory) -> None:
    start(run)
    spike(run)
    run.append(
        "cause",
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
    span = Span(first=60, last=64, cause="rejected", step=5, positions=(61,))
    run.append("left_out", "one sample", step=4, timeline=1, incident=1, span=span, samples=[odd])
    run.append(
        "incident",
        "incident 1: offset: loss 2.4 against 2.31",
        number=1,
        state="offset",
        onset=5,
        expected=2.31,
    )
    (incident,) = build(run).incidents
    assert (incident.state, incident.measured, incident.samples) == (
        "offset",
        {"expected": 2.31},
        13,
    )
    assert incident.closed is not None
    assert (incident.cause, incident.cause_rank) == ("hardware or nondeterminism", 1)
    assert incident.actions[-1].action == "remedy" and len(incident.actions[-1].remedies) == 2
    assert (incident.named[0].position, incident.named[0].odd) == (41, ("62 % symbols",))
    said = incident_text(run, 1)
    for part in ("on rank 1", "learning rate x 0.5", "10 steps", "20 steps", "62 % symbols"):
        assert part in said, f"{part!r} is not in\n{said}"


def test_what_was_undone_is_no_longer_left_out(run: RunDirectory) -> None:
    finished(run)
    undone = [
        event.data["span"] for event in run.events() if event.kind in ("left_out", "rollback")
    ]
    data = {
        "to_step": 2,
        "from_step": 6,
        "new_timeline": 2,
        "rollbacks": [1],
        "pardons": [[36, 48]],
        "lines": [4],
    }
    run.append("undo", "line 9 undone", step=6, timeline=1, spans=undone, incident=1, **data)
    report = build(run)
    assert report.samples_skipped == 0 and quarantine_lines(run) == []
    assert report.incidents[0].samples == 0 and report.incidents[0].actions[-1].action == "undo"
    assert "undo" in text(run) and "step 6: undo, restored step 2" in commands_text(run)


# -- pages


class Tags(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


HARMLESS = set(
    "html head meta title style body h1 h2 ul li p blockquote table tr th td code figure figcaption "
    "svg text line polyline polygon circle".split()
)


def test_a_page_holds_the_whole_story_and_its_curves(run: RunDirectory) -> None:
    finished(run)
    rows(run, 7, timeline=1, grad_norm=1.0, eval_loss=2.5, loss_baseline=2.0, loss_threshold=9.0)
    rows(run, 8, timeline=1, verdict=Action.SKIP)
    seen = Tags(page := written(run, "html"))
    assert seen.open == [] and seen.tags <= HARMLESS
    for part in (
        "6 of 6 steps",
        "Incident 1: step 5, recovered",
        "2 steps discarded",
        "/data/0037.txt",
        "Ã‚Â Ã‚Â",
        "lr 0.5",
    ):
        assert part in seen.text, part
    assert (
        "loss (nats a token)" in seen.text
        and "gradient norm" in seen.text
        and page.count("<svg") == 2
    )
    assert page.count('class="tried"') == 3, "two tries of step 5, one of step 8"
    assert 'class="gone"' in page and 'class="here"' in page and 'class="eval"' in page
    assert not re.search(r"https?://|url\(|@import", page), "nothing is fetched"


def test_markdown_has_the_same(run: RunDirectory) -> None:
    finished(run)
    told = written(run, "markdown")
    for part in (
        f"# {run.name}: finished, 6 of 6 steps",
        "## Incident 1: step 5, recovered",
        "2 steps discarded",
        "\n> Ã‚Â Ã‚Â",
        "Checkpoints: ",
        "## Commands",
    ):
        assert part in told, f"{part!r} is not in\n{told}"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Of documents, of excerpts, of tokens, of the journal, and in the name of the run itself."""
    run = RunDirectory.create_at(tmp_path / "<b>n\x1b[2J[x](y)`\u202e", "")
    evil = "</li><script>alert(1)</script><img src=x onerror=alert(1)> [a](javascript:x) ![b](//x) `c` \x1b[2J\n# zz"
    start(run, host=evil)
    rows(run, 1, 2)
    document = {"path": evil, "excerpt": evil}
    span = Span(first=0, last=4, cause="rejected", step=1, reason=evil)
    run.append(
        "verdict", evil, step=1, action="skip", findings=[finding(2, signal=evil)], incident=1
    )
    sample = {"position": 1, "loss": 9.0, "excerpt": evil, "odd": [evil], "documents": [document]}
    run.append(
        "left_out", evil, step=1, span=span, documents=[document], samples=[sample], incident=1
    )
    remedy = {"kind": evil, "value": 0.5, "from_step": 3, "hold": 1}
    run.append("remedy", evil, step=1, incident=1, remedies=[remedy])
    run.append("incident", evil, step=1, number=1, state="offset", onset=1, **{evil: 1.0})
    run.append("cause", evil, incident=1, cause=evil, reason=evil)
    run.append("hung", evil)
    run.append("ended", evil, phase=evil, reason=evil)
    page = written(run, "html")
    seen = Tags(page)
    assert seen.open == [] and seen.tags <= HARMLESS
    assert not {
        name
        for name in seen.attributes
        if name in ("src", "href", "style") or name.startswith("on")
    }
    assert "<script>alert(1)</script>" in seen.text
    told = written(run, "markdown")
    assert "<" not in told and not re.search(r"(?<!\\)[\[\]`]", told)
    assert not [line for line in told.splitlines() if line.startswith("# zz")]
    for content in (page, told, written(run, "terminal")):
        assert_harmless(content)


def test_a_run_without_rows_has_pages_too(run: RunDirectory) -> None:
    for form in ("terminal", "markdown", "html"):
        assert "No incidents" in written(run, form)


def test_a_file_is_written_in_the_form_that_its_name_asks_for(
    run: RunDirectory, tmp_path: Path
) -> None:
    finished(run)
    for name, begin in (
        ("a.md", "# "),
        ("a.html", "<!doctype html>"),
        ("a.txt", run.name),
        ("a.json", "{"),
    ):
        options = ["--json"] if name == "a.json" else []
        assert main(["report", str(run.path), "-o", str(tmp_path / name), *options]) == 0
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(begin)
    assert main(["report", str(run.path), "-o", str(tmp_path / "no" / "a.md")]) == 2
    assert main(["report", str(run.path), "--json", "--format", "html"]) == 2


def test_a_million_steps_make_a_small_picture(run: RunDirectory) -> None:
    import numpy as np

    with run.metrics_writer() as writer:
        columns = writer.columns
        writer.append({"step": 1, "timeline": 0, "loss": 5.0, "verdict": 0})
    table = np.full((300_000, len(columns)), np.nan)
    table[:, columns.index("step")] = np.arange(2, 300_002)
    table[:, columns.index("timeline")] = table[:, columns.index("verdict")] = 0
    table[:, columns.index("loss")] = 2.0 + np.random.default_rng(0).normal(size=300_000) * 0.01
    table[150_000, columns.index("loss")] = 400.0
    with run.metrics_path.open("ab") as file:
        file.write(table.astype("<f8").tobytes())
    page = written(run, "html")
    assert len(page) < 60_000
    (line,) = re.findall(r'<polyline class="here" points="([^"]*)"', page)
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert min(heights) < 30 and sorted(heights)[5] > 100, "the one spike reaches the top"


@pytest.mark.parametrize("column", ["step", "timeline", "verdict", "loss", "step_time"])
def test_a_metrics_file_full_of_nonsense_does_not_break_the_report(
    run: RunDirectory, column: str
) -> None:
    finished(run)
    run.append("restarted", "continues at step 2", step=2, timeline=2, checkpoint="step-00000002")
    whole_file = run.metrics_path.read_bytes()
    at = run.metrics().columns.index(column)
    for value in (math.nan, math.inf, -math.inf, 1e300):
        for where in (slice(None), slice(-1, None)):
            table = np.frombuffer(whole_file).reshape(-1, len(run.metrics().columns)).copy()
            table[where, at] = value
            run.metrics_path.write_bytes(table.tobytes())
            assert all(len(line) <= 80 for line in sketch(run, build(run).incidents)), (
                value,
                where,
            )
            for form in ("terminal", "html"):
                assert "finished" in written(run, form)


@pytest.mark.parametrize("byte", [b"[", b"\x7f", b"\xff", b"\x00"])
def test_a_metrics_file_of_one_byte_over_and_over(run: RunDirectory, byte: bytes) -> None:
    finished(run)
    run.metrics_path.write_bytes(byte * 100_000)
    for form in ("terminal", "markdown", "html"):
        assert "finished" in written(run, form)


@pytest.mark.parametrize("damage", ["[data", "x = " + "[" * 100_000])
def test_a_quarantine_of_a_configuration_that_cannot_be_read_is_refused(
    run: RunDirectory, damage: str
) -> None:
    (run.path / "config.toml").write_text(damage)
    with pytest.raises(RunDirectoryError, match="not valid TOML"):
        quarantine_lines(run)
    (run.path / "config.toml").unlink()
    assert quarantine_lines(run) == []
    os.mkfifo(run.path / "config.toml")
    with without_waiting(), pytest.raises(RunDirectoryError, match="not a regular file"):
        quarantine_lines(run)
