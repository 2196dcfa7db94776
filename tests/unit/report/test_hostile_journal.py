"""Nothing that a journal or a metrics file holds breaks the report or reaches the terminal."""

from __future__ import annotations

import json
import math
import random

from guardrail.core.records.spans import Span
from guardrail.report.build import build_report
from guardrail.report.output import (
    commands_text,
    incident_text,
    report_as_dict,
    summary_text,
)
from guardrail.rundir.run_directory import RunDirectory
from tests.support.findings import make_finding
from tests.support.report_runs import (
    assert_harmless,
    start,
)

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
    kinds = """started restarted resume_check finding verdict skipped rollback incident command checkpoint durability
        eval paused resumed note rank_hung rank_failed ended future""".split()
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
            report_as_dict(run)
            assert_harmless(summary_text(run))


def test_a_field_that_cannot_be_read_is_empty_and_the_rest_of_its_line_is_shown(
    run: RunDirectory,
) -> None:
    start(run, host=[1, 2])
    run.append("command", id=7, command="lr", value=[1], who={"a": 1}, effect="applied", reason=[])
    run.append("checkpoint", path="step-3", state=[1], cp_step=2.5, bytes="x", step=4)
    run.append("rank_failed", "gone", rank=2.5, host=3, log="logs/rank-1.log", step=5)
    run.append("restarted", checkpoint=[1], reason=7, step=3, timeline=1)
    run.append("ended", "all over", phase=[1], reason={}, exit_code="x", step=6, timeline=1)
    report = build_report(run)
    (command,), (checkpoint,), (fault,) = report.commands, report.checkpoints, report.faults
    assert (command.id, command.command, command.who, command.effect) == ("", "lr", "", "applied")
    assert math.isnan(command.value)
    assert (checkpoint.name, checkpoint.state, checkpoint.step) == ("step-3", "", 4)
    assert (fault.rank, fault.host, fault.log) == (-1, "", "logs/rank-1.log")
    assert (report.restarts[0].checkpoint, report.restarts[0].sentence) == ("", "")
    assert (report.host, report.state, report.reason) == ("", "ended", "all over")
    assert report.exit_code is None and report.world == 2


def test_no_control_character_of_a_document_reaches_the_terminal(run: RunDirectory) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e[/red]\n"
    start(run, host=evil)
    document = {"path": evil, "excerpt": evil}
    span = Span(first=0, last=4, origin="rejected", step=1, reason=evil)
    bad = make_finding(2, signal=evil)
    run.append(
        "verdict",
        evil,
        step=1,
        action="skip",
        findings=[bad],
        incident=1,
        parameters={evil: [evil]},
    )
    run.append("skipped", evil, step=1, span=span, documents=[document], incident=1)
    run.append("command", evil, id=evil, command=evil, who=evil, effect=evil, reason=evil)
    run.append("checkpoint", evil, path=evil, state=evil, reason=evil)
    run.append("restarted", evil, step=1, timeline=1, checkpoint=evil)
    run.append("resume_check", evil, schedule=evil)
    run.append("rank_hung", evil)
    run.append("ended", evil, phase=evil, reason=evil)
    said = summary_text(run)
    assert_harmless(said)
    assert "[/red]" in said
    for other in (incident_text(run, 1, excerpts=True), commands_text(run)):
        assert_harmless(other)
