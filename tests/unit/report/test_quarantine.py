"""The quarantine of a report is what the run skips."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from guardrail.core.errors import RunDirectoryError, UsageError
from guardrail.core.records.spans import Span
from guardrail.decide.quarantine import Quarantine
from guardrail.decide.sample_cursor import SampleCursor
from guardrail.decide.sample_order import SampleOrder
from guardrail.report.build import build_report
from guardrail.report.output import (
    report_as_dict,
    summary_text,
)
from guardrail.report.quarantine import quarantine_lines
from guardrail.report.summary import describe_incidents
from guardrail.rundir.run_directory import RunDirectory
from tests.support.report_runs import (
    finished,
    start,
)


@pytest.mark.parametrize("seed_name", ["order_seed", "seed"])  # the second: older versions
@pytest.mark.parametrize("shuffled", [True, False])
def test_the_quarantine_is_what_the_ledger_held(
    run: RunDirectory, tmp_path: Path, shuffled: bool, seed_name: str
) -> None:
    file = tmp_path / "known.txt"
    file.write_text("# found before\n3\n\n17@1\n")
    run.write_config(f"[data]\nquarantine = {json.dumps(str(file))}\n")
    order = SampleOrder(samples=23, seed=5, shuffled=shuffled)
    ledger = SampleCursor(order, batch_size=4)
    ledger.quarantine.read(file.read_text().splitlines())
    run.append("started", samples=23, shuffled=shuffled, **{seed_name: 5})
    spans = [
        Span(first=8, last=12, origin="rejected", step=2),
        Span(first=21, last=27, origin="rollback", step=4),  # across the end of an epoch
        Span(first=60, last=71, origin="user", step=9),
    ]
    for span in spans:
        ledger.skip_span(span)
    run.append("skipped", span=spans[0])
    run.append("rollback", span=spans[1], to_step=3, new_timeline=1)
    run.append("skipped", span=spans[1])
    run.append("skipped", span=spans[2])
    lines = quarantine_lines(run)
    assert (
        lines == list(ledger.quarantine.lines())
        and len(lines) > 12
        and any("@" in line for line in lines)
    )
    again = Quarantine()
    again.read(lines)
    assert list(again.lines()) == lines
    run.append("skipped", broken="line", span={"first": "x"})
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
    run.append("skipped", span=Span(first=0, last=4, origin="rejected", step=1))
    with pytest.raises(RunDirectoryError) as caught:
        quarantine_lines(run)
    assert caught.value.kind == "unknown_order"
    report = build_report(run)
    assert report.samples_skipped == -1
    said = describe_incidents(report)
    assert said in summary_text(run) and "samples" in said.lower()
    assert not re.search(r"\d+ sample", said), "it is said without a number"
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
    build_report(run), summary_text(run), report_as_dict(run), quarantine_lines(run)
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
    assert build_report(run).incidents == ()
