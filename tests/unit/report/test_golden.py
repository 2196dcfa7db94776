"""The report of a stored run and of a made one, compared to the character: see
tests/support/golden.py.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from guardrail.core.records.status import Phase
from guardrail.report.output import commands_text, incident_text, render_report
from guardrail.rundir.run_directory import RunDirectory
from tests.support.fake_run import FakeRun
from tests.support.golden import assert_golden
from tests.support.places import TESTS

ENDINGS = {"terminal": "txt", "markdown": "md", "html": "html"}


@pytest.fixture
def stored(tmp_path: Path) -> RunDirectory:
    """A run with a rollback, an undo, commands, a failed rank and two restarts."""
    path = tmp_path / "old" / "2026-11-30-01"
    shutil.copytree(TESTS / "cases" / "old_runs" / "before_rename", path)
    config = path / "config.toml"
    config.write_text(config.read_text().replace("/tmp/old_runs", str(tmp_path)))
    return RunDirectory.open(path)


@pytest.fixture
def made(tmp_path: Path) -> RunDirectory:
    """A run whose every kind of incident evidence comes from tests/support/fake_run.py."""
    fake = FakeRun(total=260).begin()
    fake.advance(120).spike().recover().advance(180).not_a_number().recover()
    fake.advance(240).spike(under_way=True).weigh()
    fake.end(Phase.HALTED, 3)
    run = fake.write(tmp_path)
    path = tmp_path / "fake" / "2026-11-25-01"
    path.parent.mkdir()
    shutil.move(run.path, path)
    return RunDirectory.open(path)


def assert_report_golden(name: str, form: str, report: str) -> None:
    """Compare a report with its golden file.

    The style is the same in each page. So the golden pages leave it out, and one more golden file
    holds its digest.
    """
    if form == "html":
        before, mark, rest = report.partition("<style>\n")
        style, end_mark, after = rest.partition("\n</style>")
        assert mark and end_mark
        digest = hashlib.sha256(style.encode()).hexdigest()
        assert_golden("report_style.sha256", digest + "\n")
        report = before + after
    assert_golden(f"{name}.{ENDINGS[form]}", report)


@pytest.mark.parametrize("form", ENDINGS)
def test_the_report_of_a_stored_run(stored: RunDirectory, form: str) -> None:
    assert_report_golden("report_stored", form, render_report(stored, form))


@pytest.mark.parametrize("form", ENDINGS)
def test_the_report_of_a_made_run(made: RunDirectory, form: str) -> None:
    assert_report_golden("report_made", form, render_report(made, form))


def test_the_details_of_an_incident(stored: RunDirectory, made: RunDirectory) -> None:
    assert_golden("report_incident.txt", incident_text(stored, 1, excerpts=True) + "\n")
    assert_golden("report_incident_with_samples.txt", incident_text(made, 3) + "\n")


def test_the_commands(stored: RunDirectory) -> None:
    assert_golden("report_commands.txt", commands_text(stored) + "\n")


def test_the_loss_curve(stored: RunDirectory) -> None:
    assert_golden("report_chart.txt", render_report(stored, "terminal", chart=True))
