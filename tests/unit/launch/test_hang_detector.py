"""When a rank counts as hung, and what is read from torch elastic's log."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from guardrail.core.records.status import Phase, RankStatus
from guardrail.core.sections import LaunchSection
from guardrail.launch import torchrun as elastic
from guardrail.launch.hang_detector import LONGEST_LOOK, HangDetector
from guardrail.launch.torchrun import Failure
from guardrail.rundir import processes
from tests.support.lab import wait_for

LAUNCH = LaunchSection(setup_timeout=100, step_timeout=10, eval_timeout=30, save_timeout=20)


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
    watch = HangDetector(LAUNCH)
    ranks = {100: report(100, phase=phase)}
    looks = 0
    while not (hung := watch.find_hung(ranks, 1.0)):
        looks += 1
        assert looks < 1000
    assert looks == seconds + 1, "the first look only learns"
    assert (hung[0].pid, hung[0].rank, hung[0].phase) == (100, 0, phase)
    assert watch.find_hung(ranks, 1.0) == [], "reported once"


def test_progress_and_a_new_phase_start_the_count_anew() -> None:
    watch = HangDetector(LAUNCH)
    for number in range(100):
        assert watch.find_hung({100: report(100, progress=number // 9)}, 1.0) == []
    for number in range(100):
        phase = (Phase.STEP, Phase.EVAL)[number // 9 % 2]
        assert watch.find_hung({100: report(100, phase=phase, progress=11)}, 1.0) == []


def test_a_process_that_never_reports_has_the_deadline_of_the_set_up() -> None:
    watch = HangDetector(LAUNCH)
    looks = 0
    while not (hung := watch.find_hung({7: None}, 1.0)):
        looks += 1
    assert looks == 101 and hung[0].rank is None


def test_a_new_incarnation_begins_without_a_past() -> None:
    watch = HangDetector(LAUNCH)
    for _ in range(10):
        watch.find_hung({100: report(100)}, 1.0)
    for _ in range(10):
        assert watch.find_hung({101: report(101)}, 1.0) == []
    assert watch.find_hung({100: report(100)}, 1.0) == [], "not even one that gets the same pid"


def test_a_watcher_that_was_stopped_itself_reports_no_rank() -> None:
    watch = HangDetector(LAUNCH)
    watch.find_hung({100: report(100)}, 1.0)
    assert watch.find_hung({100: report(100)}, 3600.0) == [], "a laptop that slept for an hour"
    assert LONGEST_LOOK < LAUNCH.step_seconds
    assert watch.find_hung({100: report(100)}, 3600.0) == []
    assert len(watch.find_hung({100: report(100)}, 3600.0)) == 1, (
        "three looks without progress are too many"
    )


def test_the_longest_idle_comes_first() -> None:
    watch = HangDetector(LAUNCH)
    watch.find_hung({101: report(101)}, 1.0)
    watch.find_hung({101: report(101)}, 3.9)
    ranks = {100: report(100), 101: report(101)}
    for seconds in (0.0, 3.0, 3.0):
        assert watch.find_hung(ranks, seconds) == []
    assert [(one.pid, round(one.seconds, 1)) for one in watch.find_hung(ranks, 5.0)] == [
        (101, 14.9),
        (100, 11.0),
    ]


# -- a process that is stopped


def beating(
    pid: int, look: int, *, progress: int = 0, still: bool = False, phase: Phase = Phase.STEP
) -> RankStatus:
    """Its heartbeat thread has written a second ago, or long ago."""
    return RankStatus(
        rank=pid - 100,
        pid=pid,
        host="here",
        phase=phase,
        progress=progress,
        heartbeat=5.0 if still else 1e9 + look,
    )


@pytest.mark.fault("R1")
@pytest.mark.parametrize("phase", [Phase.SETUP, Phase.STEP, Phase.SAVE])
def test_a_stopped_rank_is_found_in_half_a_minute_whatever_its_phase_allows(phase: Phase) -> None:
    """Its heartbeat is silent, and its peer waits. Both have not got ahead; only one of them is
    stopped.
    """
    watch = HangDetector(LaunchSection(step_timeout=9000, save_timeout=9000))
    for look in range(32):
        ranks = {
            100: beating(100, look, phase=phase),
            101: beating(101, look, still=True, phase=phase),
        }
        hung = watch.find_hung(ranks, 1.0)
        assert bool(hung) == (look == 31), look
    assert [(one.rank, one.phase, round(one.silent), one.stopped) for one in hung] == [
        (1, phase, 31, True)
    ]


def test_a_stopped_rank_without_peers_is_found_as_well() -> None:
    watch = HangDetector(LaunchSection(step_timeout=9000))
    looks = [watch.find_hung({100: beating(100, look, still=True)}, 1.0) for look in range(32)]
    assert [bool(hung) for hung in looks] == [False] * 31 + [True]


def test_a_slow_rank_is_not_taken_for_a_stopped_one() -> None:
    """It still reports; or nothing in Python can run, and it works; or its peers get ahead without
    it.
    """
    reports, works, alone, over = (HangDetector(LaunchSection(step_timeout=9000)) for _ in range(4))
    for look in range(400):
        both = {100: beating(100, look), 101: beating(101, look)}
        assert reports.find_hung(both, 1.0) == []
        silent = {100: beating(100, look), 101: beating(101, look, still=True)}
        assert works.find_hung(silent, 1.0, cpu_seconds={100: 1.0, 101: look // 9}) == []
        ahead = {100: beating(100, look, progress=look // 3), 101: beating(101, look, still=True)}
        assert alone.find_hung(ahead, 1.0) == []
        closed = msgspec.structs.replace(beating(100, look, still=True), closed=True)
        assert over.find_hung({100: closed}, 1.0) == [], "its loop is over, and the script goes on"


def test_one_that_is_stopped_before_it_could_report_is_found_too() -> None:
    """A process that has not reported and is not stopped may wait for a slow disk."""
    watch = HangDetector(LAUNCH)
    looks = [
        watch.find_hung(
            {100: None, 101: None}, 1.0, cpu_seconds={100: 0.1, 101: 0.1}, stopped=[101]
        )
        for _ in range(32)
    ]
    assert not any(looks[:-1])
    assert [(one.pid, one.rank, one.stopped) for one in looks[-1]] == [(101, None, True)]


# -- torch elastic

LINES = (
    b"W1125 03:08:38.088000 7032 torch/[...]/api.py:1028] Sending process 71 closing signal SIGTERM\n"
    b"E1125 03:08:38.098000 7032 torch/[...]/api.py:1002] "
    b"failed (exitcode: -9) local_rank: 1 (pid: 7103) of binary: /bin/sh\n"
)


def agent_that_prints(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> elastic.Agent:
    """An agent that is a shell script."""
    monkeypatch.setattr(elastic, "build_command", lambda launch, **_: ["/bin/sh", "-c", script])
    return elastic.Agent(LaunchSection(), folder, folder / "elastic.log", incarnation=0, restarts=0)


def test_failures_are_read_once_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "begin").write_bytes(LINES[:-10])
    (tmp_path / "rest").write_bytes(LINES[-10:])
    script = (
        f"cd {tmp_path}; cat begin; until [ -e go ]; do sleep 0.02; done; cat rest; exec sleep 600"
    )
    agent = agent_that_prints(monkeypatch, tmp_path, script)
    try:
        seen: list[elastic.Output] = []
        wait_for(
            lambda: seen.append(agent.read_output()) or seen[-1].closing, what="the first line"
        )  # type: ignore[func-returns-value]
        assert seen[-1] == elastic.Output(closing=(71,)), "the second line is not complete"
        (tmp_path / "go").touch()
        wait_for(
            lambda: seen.append(agent.read_output()) or seen[-1].failures, what="the second line"
        )  # type: ignore[func-returns-value]
        assert seen[-1] == elastic.Output(failures=(Failure(exit=-9, local_rank=1, pid=7103),))
        assert agent.read_output() == elastic.Output()
    finally:
        agent.end()
    assert agent.read_output() == elastic.Output()
    assert (tmp_path / "elastic.log").read_bytes() == LINES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.fault("R2")
def test_an_agent_is_heard_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines").write_bytes(LINES)
    (tmp_path / "elastic.log").symlink_to("/dev/full")
    agent = agent_that_prints(monkeypatch, tmp_path, f"cat {tmp_path / 'lines'}")
    try:
        agent.process.wait()
        assert agent.read_output().failures == (Failure(exit=-9, local_rank=1, pid=7103),)
    finally:
        agent.end()


def test_the_exception_that_ended_a_rank_is_read_and_its_file_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is that of torch's error handler, at the path that the rank's shell exports."""
    (tmp_path / "logs").mkdir()
    stale = tmp_path / "logs" / "error-0-99.json"
    stale.write_text("{}")
    rank = tmp_path / "rank.py"
    rank.write_text(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\n"
        "def main() -> None:\n"
        "    raise ValueError('two\\nlines')\n"
        "main()\n"
    )
    shell = " ".join(shlex.quote(word) for word in ("/bin/sh", "-c", elastic._RANK, "rank"))
    script = (
        f"RANK=0 {shell} {sys.executable} {rank} & pid=$!; wait $pid; "
        'echo "failed (exitcode: 1) local_rank: 0 (pid: $pid) of binary: /bin/sh"'
    )
    agent = agent_that_prints(monkeypatch, tmp_path, script)
    try:
        assert not stale.exists()
        agent.process.wait()
        (failure,) = agent.read_output().failures
        assert failure.error == "ValueError: two lines"
    finally:
        agent.end()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["rank-0.log"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, ""),
        ("", ""),
        ("[]", ""),
        ('{"message": 3}', "3"),
        ('{"message": "KeyError: 1"}', "KeyError: 1"),
        ('{"message": {"extraInfo": {}}}', ""),
    ],
)
def test_an_error_file_of_any_content_is_read(
    tmp_path: Path, content: str | None, error: str
) -> None:
    file = tmp_path / "error.json"
    if content is not None:
        file.write_text(content)
    assert elastic.read_error(file) == error


def test_the_installed_torch_says_a_failure_in_the_words_that_are_read() -> None:
    """All that is read from torch's log; a new version may say it otherwise."""
    import torch

    source = Path(torch.__file__).parent / "distributed" / "elastic" / "multiprocessing" / "api.py"
    formats = (
        '"failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s"',
        '"Sending process %s closing signal %s"',
    )
    assert all(text in source.read_text() for text in formats)


def test_several_nodes_use_the_rendezvous_of_the_configuration() -> None:
    launch = LaunchSection(
        nodes=2, node_rank=1, rendezvous_endpoint="head:29400", rendezvous_backend="static"
    )
    line = elastic.build_command(launch, name="run-1", restarts=3)
    for argument in (
        "--nnodes=2",
        "--node-rank=1",
        "--rdzv-endpoint=head:29400",
        "--rdzv-backend=static",
    ):
        assert argument in line
    assert "--rdzv-id=run-1" in line and "--rdzv-conf=is_host=0,join_timeout=600" in line
    alone = elastic.build_command(LaunchSection(processes=4), name="run-1", restarts=0)
    assert "--rdzv-endpoint=127.0.0.1:0" in alone and "--max-restarts=0" in alone


@pytest.mark.fault("R1")
def test_no_two_starts_of_the_ranks_share_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one node an agent starts its ranks once; an agent that starts them again makes a store for
    each start.
    """
    launch = LaunchSection(nodes=2, rendezvous_endpoint="head:29400")
    for value in (None, "0"):
        if value is not None:
            monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", value)
        assert (
            elastic.build_environment(launch, tmp_path, incarnation=0)[
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
            ]
            == "1"
        )


@pytest.mark.parametrize(
    ("threads", "given", "expected"), [(0, None, "2"), (3, None, "3"), (0, "7", "7"), (3, "7", "3")]
)
def test_threads_of_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, given: str | None, expected: str
) -> None:
    monkeypatch.setattr("guardrail.launch.torchrun.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    variables = elastic.build_environment(
        LaunchSection(processes=4, threads=threads), tmp_path, incarnation=0
    )
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
