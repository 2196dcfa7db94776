"""However much has happened in a run, its summary has at most 25 lines of 110 columns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guardrail.core.records.spans import Span
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.report.build import build_report
from guardrail.report.formats import COLUMNS
from guardrail.report.output import commands_text, incident_text, summary_text
from guardrail.report.render_text import LINES, render_summary
from guardrail.report.summary import describe_checkpoints, list_next_commands
from guardrail.report.table_rows import choose_costliest, make_rows
from guardrail.rundir.run_directory import RunDirectory
from tests.support.findings import make_finding
from tests.support.places import TESTS

COUNTS = (0, 1, 8, 9, 40)
LONG = "a/very-long_name.with parts " * 40
REASONS = (
    "loss 5.1 comes again, 1 of 3 other batches show it (1.9, 2.1, 5.9) over 3.3, and from the state of "
    "step 3 the batch has 5.2, where another batch has 2.2 too; with its labels in another order the "
    "loss is 0.01 higher, and 2.1 with usual batches",
    "",
)


def add_incident(run: RunDirectory, number: int, *, words: str = "") -> None:
    """Two rejected batches, and a rollback for every third; the higher the number, the costlier."""
    step = 10 * number
    found = make_finding(step, signal=words or "loss", ranks=(0, 1, 2, 3, 4))
    data: dict[str, Any] = {"step": step - 1, "incident": number}
    for batch in range(2):
        first = 100 * number + 8 * batch
        with run.metrics_writer() as rows:
            rows.append({"step": step, "timeline": 0, "verdict": 1, "step_time": float(number)})
        message = f"skip {words}"
        run.append(
            "verdict", message, action="skip", findings=[found], batch=[first, first + 8], **data
        )
        documents = [{"path": f"/data/{words}{number}.txt", "first_byte": 0, "last_byte": 90}]
        odd = {"position": first, "odd": [f"90% {words}"], "documents": documents}
        span = Span(first=first, last=first + 8, origin="rejected", step=step, reason=words)
        run.append("skipped", words, span=span, documents=documents, samples=[odd], **data)
    run.append("incident", words, step=step, number=number, state="open", onset=step)
    reason = REASONS[number % 2]
    if reason:
        run.append("diagnosis", words, cause="data", reason=reason + words, host=words, **data)
    if number % 3 == 0:
        back = {
            "to_step": step - 5,
            "from_step": step - 1,
            "new_timeline": number,
            "tier": "memory",
        }
        run.append("rollback", words, **data, **back)
    state = {"state": "recovered", "expected": 2.2, "got": 2.3, "noise": 0.1}
    run.append("incident", words, step=step + 5, number=number, onset=step, **state)


def make_run(folder: Path, count: int, *, words: str = "", faults: int = 0) -> RunDirectory:
    run = RunDirectory.create(folder, words.replace("/", "").replace(" ", "")[:100] or "many", "")
    run.append("started", words, world=5, samples=10_000, order_seed=1, host=words)
    for number in range(1, count + 1):
        add_incident(run, number, words=words)
        if number <= faults:
            run.append(
                "rank_failed", words or f"rank {number} failed", step=10 * number, rank=number
            )
            run.append("restarted", words, step=10 * number, timeline=number)
            run.append("resume_check", words, data=words or "another order")
    for at in range(9):
        state = {
            "cp_step": 20 * at,
            "state": "good" if at < 7 else "candidate",
            "bytes": 10_062_144,
        }
        run.append("checkpoint", words, step=20 * at, path=f"step-{at}", **state)
    run.append("checkpoint", words, path="", state="failed", reason=words or "No space left")
    for command in ("pause", "undo", "skip"):
        run.append("command", words, command=command, who=words, effect="applied", reason=words)
    run.append("note", words or "a note")
    run.append("ended", words, phase="halted", exit_code=3, reason=words)
    status = Status(
        run=run.name, phase=Phase.HALTED, step=10**9, total_steps=10**9, cursor=10**9,
        tokens=10**15, exit_code=3, mode=Mode.AUTO, guard_share=0.033, question=words,
    )  # fmt: skip
    run.write_status(status)
    return run


def assert_fits(said: str, *, lines: int | None = LINES) -> None:
    found = said.splitlines()
    assert lines is None or len(found) <= lines, f"{len(found)} lines:\n{said}"
    assert max(map(len, found)) <= COLUMNS, max(found, key=len)
    assert "\n\n\n" not in said and not any(line.endswith(" ") for line in found)


@pytest.mark.parametrize("words", ["", LONG], ids=["short", "long"])
@pytest.mark.parametrize("faults", [0, 3])
@pytest.mark.parametrize("count", COUNTS)
def test_a_summary_fits_a_screen(tmp_path: Path, count: int, faults: int, words: str) -> None:
    run = make_run(tmp_path, count, words=words, faults=faults)
    report = build_report(run)
    assert len(report.incidents) == count
    for spec in (run.name, str(run.path), LONG):
        assert_fits(render_summary(report, spec=spec))
    assert_fits(commands_text(run), lines=None)
    if count:
        assert_fits(incident_text(run, count, excerpts=True), lines=None)


@pytest.mark.parametrize("name", ["59cf01d", "before_rename"])
def test_the_summary_of_a_stored_run_fits_a_screen(name: str, tmp_path: Path) -> None:
    path = tmp_path / "old" / "2026-11-30-01"
    shutil.copytree(TESTS / "cases" / "old_runs" / name, path)
    run = RunDirectory.open(path)
    assert_fits(summary_text(run))
    for incident in build_report(run).incidents:
        assert_fits(incident_text(run, incident.number, excerpts=True), lines=None)


@pytest.mark.parametrize("count", COUNTS)
def test_the_costliest_incidents_are_shown_and_the_others_counted(
    tmp_path: Path, count: int
) -> None:
    run = make_run(tmp_path, count)
    report = build_report(run)
    incidents = [row for row in make_rows(report) if row.kind == "incident"]
    shown = [row.number for row in choose_costliest(incidents, 8)]
    assert shown == list(range(max(1, count - 7), count + 1))
    lines = summary_text(run).splitlines()
    table = lines[next(at for at, line in enumerate(lines) if "what happened" in line) :]
    rows = [line.split() for line in table[1 : table.index("")]]
    numbers = [int(row[0]) for row in rows if row[0].isdigit() and row[1].isdigit()]
    # One row is of the checkpoint that could not be saved: it is not resolved.
    assert numbers == shown[-7:]
    counted = [row[1:3] for row in rows if row[0] == "and"]
    assert [int(number) for number, _ in counted] == [count - 7] * (count > 7)
    assert any("No incidents." in line for line in lines) == (count == 0)
    if count:
        assert f"--incident {count}" in "".join(
            command for command, _ in list_next_commands(report, "x")
        )


def test_each_incident_has_its_paragraph_where_there_is_room(tmp_path: Path) -> None:
    lines = summary_text(make_run(tmp_path, 2)).splitlines()
    assert [line[:3] for line in lines if line.startswith("#") and line[1:2] != " "] == [
        "#1 ",
        "#2 ",
    ]


def test_a_run_without_incidents_is_short(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "calm", "")
    run.append("started", "x", world=1, host="h")
    run.append("ended", "x", phase="finished", exit_code=0)
    report = build_report(run)
    lines = [line for line in summary_text(run).splitlines() if line]
    assert lines[2:] == ["No incidents.", describe_checkpoints(report)]
    asked = msgspec.structs.replace(report, state="running", question="go back?")
    assert [command.split()[1] for command, _ in list_next_commands(asked, "x")] == ["attach"]
