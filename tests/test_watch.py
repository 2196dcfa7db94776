"""When a rank counts as hung, and what is read from torch elastic's log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guardrail import elastic, processes
from guardrail.config import LaunchSection
from guardrail.elastic import Failure
from guardrail.records import Phase, RankStatus
from guardrail.watch import LONGEST_LOOK, Watch

LAUNCH = LaunchSection(setup_seconds=100, step_seconds=10, eval_seconds=30, save_seconds=20)


def report(pid: int, *, phase: Phase = Phase.STEP, progress: int = 0) -> RankStatus:
    return RankStatus(rank=pid - 100, pid=pid, host="here", phase=phase, progress=progress)


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        (Phase.SETUP, 100),
        (Phase.STEP, 10),
        (Phase.EVAL, 30),
        (Phase.SAVE, 20),
        (Phase.ROLLBACK, 20),
        (Phase.PAUSED, 10),
        (Phase.FINISHED, 20),
    ],
)
def test_each_phase_has_its_deadline(phase: Phase, seconds: float) -> None:
    watch = Watch(LAUNCH)
    ranks = {100: report(100, phase=phase)}
    looks = 0
    while not (hung := watch.look(ranks, 1.0)):
        looks += 1
        assert looks < 1000
    assert looks == seconds + 1, "the first look only learns"
    assert (hung[0].pid, hung[0].rank, hung[0].phase) == (100, 0, phase)
    assert watch.look(ranks, 1.0) == [], "reported once"


def test_progress_and_a_new_phase_start_the_count_anew() -> None:
    watch = Watch(LAUNCH)
    for number in range(100):
        assert watch.look({100: report(100, progress=number // 9)}, 1.0) == []
    for number in range(100):
        phase = (Phase.STEP, Phase.EVAL)[number // 9 % 2]
        assert watch.look({100: report(100, phase=phase, progress=11)}, 1.0) == []


def test_a_process_that_never_reports_has_the_deadline_of_the_set_up() -> None:
    watch = Watch(LAUNCH)
    looks = 0
    while not (hung := watch.look({7: None}, 1.0)):
        looks += 1
    assert looks == 101 and hung[0].rank is None


def test_a_new_incarnation_begins_without_a_past() -> None:
    watch = Watch(LAUNCH)
    for _ in range(10):
        watch.look({100: report(100)}, 1.0)
    for _ in range(10):
        assert watch.look({101: report(101)}, 1.0) == []
    assert watch.look({100: report(100)}, 1.0) == [], "not even one that gets the same pid"


def test_a_watcher_that_was_stopped_itself_does_not_blame_the_ranks() -> None:
    watch = Watch(LAUNCH)
    watch.look({100: report(100)}, 1.0)
    assert watch.look({100: report(100)}, 3600.0) == [], "a laptop that slept for an hour"
    assert LONGEST_LOOK < LAUNCH.step_seconds
    assert watch.look({100: report(100)}, 3600.0) == []
    assert len(watch.look({100: report(100)}, 3600.0)) == 1, "three looks without progress are too many"


def test_the_longest_idle_comes_first() -> None:
    watch = Watch(LAUNCH)
    watch.look({101: report(101)}, 1.0)
    watch.look({101: report(101)}, 3.9)
    ranks = {100: report(100), 101: report(101)}
    for seconds in (0.0, 3.0, 3.0):
        assert watch.look(ranks, seconds) == []
    assert [(one.pid, round(one.seconds, 1)) for one in watch.look(ranks, 5.0)] == [(101, 14.9), (100, 11.0)]


# -- torch elastic

LINES = (
    b"W1125 03:08:38.088000 7032 torch/[...]/api.py:1028] Sending process 71 closing signal SIGTERM\n"
    b"E1125 03:08:38.098000 7032 torch/[...]/api.py:1002] "
    b"failed (exitcode: -9) local_rank: 1 (pid: 7103) of binary: /bin/sh\n"
)


class Quiet(elastic.Agent):
    """An agent that is only a log."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._offset = self._log.tell()


def test_failures_are_read_once_and_never_half(tmp_path: Path) -> None:
    log = tmp_path / "elastic.log"
    log.write_bytes(LINES)
    agent = Quiet(log)
    assert list(agent.failures()) == [], "of an earlier agent"
    with log.open("ab") as file:
        file.write(LINES[:-10])
        file.flush()
        assert list(agent.failures()) == []
        file.write(LINES[-10:])
    assert list(agent.failures()) == [Failure(exit=-9, local_rank=1, pid=7103)]
    assert list(agent.failures()) == []
    agent._log.close()


def test_a_failure_in_words() -> None:
    assert str(Failure(exit=1, local_rank=0, pid=1)) == "exited with 1"
    assert str(Failure(exit=-9, local_rank=0, pid=1)) == "was killed by SIGKILL"
    assert str(Failure(exit=-77, local_rank=0, pid=1)) == "was killed by signal 77"


def test_the_installed_torch_says_a_failure_in_the_words_that_are_read() -> None:
    """The one thing that is read from torch's log; a new version may say it otherwise."""
    import torch

    source = Path(torch.__file__).parent / "distributed" / "elastic" / "multiprocessing" / "api.py"
    assert '"failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s"' in source.read_text()


def test_several_nodes_use_the_rendezvous_of_the_configuration() -> None:
    launch = LaunchSection(nodes=2, node_rank=1, rendezvous_endpoint="head:29400", rendezvous_backend="static")
    line = elastic.command(launch, name="run-1", restarts=3)
    for argument in ("--nnodes=2", "--node-rank=1", "--rdzv-endpoint=head:29400", "--rdzv-backend=static"):
        assert argument in line
    assert "--rdzv-id=run-1" in line and "--rdzv-conf=is_host=0,join_timeout=600" in line
    alone = elastic.command(LaunchSection(processes=4), name="run-1", restarts=0)
    assert "--rdzv-endpoint=127.0.0.1:0" in alone and "--max-restarts=0" in alone


@pytest.mark.parametrize(
    ("threads", "given", "expected"), [(0, None, "2"), (3, None, "3"), (0, "7", "7"), (3, "7", "3")]
)
def test_threads_of_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, given: str | None, expected: str
) -> None:
    monkeypatch.setattr("guardrail.elastic.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    variables = elastic.environment(LaunchSection(processes=4, threads=threads), tmp_path, incarnation=0)
    assert variables["OMP_NUM_THREADS"] == expected


# -- processes


def test_a_pid_is_believed_only_with_its_command_line(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert processes.supervisor_of(tmp_path, process.pid) is None
    finally:
        process.kill()
        process.wait()
    assert processes.supervisor_of(tmp_path, process.pid) is None
    assert processes.supervisor_of(tmp_path, 0) is None


def test_a_zombie_is_dead_and_is_reaped_by_its_parent() -> None:
    import psutil

    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert not processes.alive(process)
    assert processes.kill([process]) == []
    assert not psutil.pid_exists(child.pid)
    child.wait()
