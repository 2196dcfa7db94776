"""Ranks report through a local disk, and the run directory gets one file a node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guardrail.core.records.status import Phase, RankStatus
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.rank_reports import LONGEST_INTERVAL, NodeReports, seconds_between
from guardrail.rundir.run_directory import RunDirectory
from guardrail.tui.model.rank_health import SILENT_SECONDS
from tests.support.lab import wait_for


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for name in ("GUARDRAIL_REPORTS", "GUARDRAIL_RUN", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return RunDirectory.create(tmp_path, "demo", "")


def report(rank: int, *, phase: Phase = Phase.STEP, pid: int = 0, progress: int = 0) -> RankStatus:
    return RankStatus(
        rank=rank, pid=pid or os.getpid(), host="h", phase=phase, progress=progress, heartbeat=1.0
    )


def test_a_supervisor_gives_each_start_a_folder_of_its_own(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = NodeReports.of_supervisor(run, node_rank=3, nodes=2, start=1)
    monkeypatch.setenv("GUARDRAIL_RUN", str(run.path))
    monkeypatch.setenv("GUARDRAIL_REPORTS", str(first.folder))
    monkeypatch.setenv("GUARDRAIL_NODE", "3")
    NodeReports.of_rank(run, start="x").write(report(24))
    assert [one.rank for one in first.read()] == [24]
    first.publish()
    assert [one.rank for one in run.read_ranks()] == [24] and os.listdir(run.path / "ranks") == [
        "node-3.json"
    ]
    second = NodeReports.of_supervisor(run, node_rank=3, nodes=2, start=2)
    assert second.read() == [] and not first.folder.exists(), "that of the earlier start is gone"
    other = NodeReports.of_rank(RunDirectory.create(run.path.parent, "other", ""), start="x")
    assert other.folder != first.folder, (
        "a run inside of a rank, such as a replay, reports for itself"
    )
    second.close()
    assert not second.folder.exists()


HOLDER = """
import sys, time
from guardrail.rundir.rank_reports import NodeReports
from guardrail.rundir.run_directory import RunDirectory
reports = NodeReports.of_supervisor(RunDirectory(sys.argv[1]), node_rank=0, nodes=1, start=1)
print(reports.folder, flush=True)
time.sleep(600)
"""


def test_ranks_that_outlive_their_supervisor_write_the_file_themselves(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        monkeypatch.setenv("GUARDRAIL_RUN", str(run.path))
        monkeypatch.setenv("GUARDRAIL_REPORTS", supervisor.stdout.readline().strip())
        monkeypatch.setenv("GUARDRAIL_NODE", "0")
        heart = Heartbeat(run, 0, seconds=0.01).start()
        wait_for(lambda: run.read_status() is not None)
        assert run.read_ranks() == [], "the supervisor would write it"
    finally:
        supervisor.kill()
        supervisor.communicate()
    wait_for(lambda: [one.rank for one in run.read_ranks()] == [0])
    heart.stop()
    assert os.listdir(run.path / "ranks") == ["node-0.json"]


def test_a_report_takes_no_more_room_once_it_is_there(run: RunDirectory, tmp_path: Path) -> None:
    """It is overwritten in place, so a disk that has become full does not make a rank look hung."""
    reports = NodeReports(run, tmp_path / "reports")
    reports.write(report(0))
    file = tmp_path / "reports" / "rank-00000.json"
    before = (file.stat().st_size, file.stat().st_ino)
    reports.write(report(0, progress=10**12))
    assert (file.stat().st_size, file.stat().st_ino) == before
    assert reports.read()[0].progress == 10**12
    file.write_text('{"rank": 0, "pi')
    assert reports.read()[0].progress == 10**12, "one that is half written: the report before it"


def test_a_node_writes_the_rarer_the_more_there_are() -> None:
    assert [seconds_between(nodes) for nodes in (1, 16, 128, 100_000)] == [
        1.0,
        1.0,
        8.0,
        LONGEST_INTERVAL,
    ]
    assert LONGEST_INTERVAL < SILENT_SECONDS, "a viewer calls a rank silent after that"
