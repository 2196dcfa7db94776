"""The real `guardrail launch`, supervisor and torch elastic with ranks that misbehave on demand
(tests/fakes).
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pexpect
import pytest

from guardrail.core.records.status import Phase
from guardrail.rundir import processes
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import DEBOUNCE_SECONDS
from tests.support.lab import Lab, small_file_system, wait_for
from tests.support.ports import free_port
from tests.support.texts import numbers_in

CONFIG = """
[run]
name = "fake"
[launch]
trainer = "faketrainer"
device = "cpu"
processes = {processes}
max_restarts = {restarts}
step_timeout = {step_seconds}
stop_timeout = {stop_seconds}
[tensorboard]
enabled = false
[fake]
{fake}
"""


# What tests/support/fakes/faketrainer says: the reason of its end, and its last line before it fails.
FINISHED, STOPPED = "finished by the fake", "stopped by the fake"
LAST_LINE = "this is the line that explains it"


def configure(
    lab: Lab,
    fake: str = "",
    *,
    processes: int = 2,
    restarts: int = 1,
    step_seconds: float = 60,
    stop_seconds: float = 60,
) -> str:
    text = CONFIG.format(
        fake=fake,
        processes=processes,
        restarts=restarts,
        step_seconds=step_seconds,
        stop_seconds=stop_seconds,
    )
    (lab.folder / "c.toml").write_text(text)
    return "c.toml"


def kinds(run: RunDirectory) -> list[str]:
    return [event.kind for event in run.events()]


def ended(run: RunDirectory) -> bool:
    status = run.read_status()
    return status is not None and status.exit_code is not None


def training(run: RunDirectory, step: int = 2) -> bool:
    """Whether this step has begun, so that the one before it is saved and a start after a kill goes
    on behind it.
    """
    status = run.read_status()
    return status is not None and status.phase is Phase.STEP and status.step >= step


def nothing_left(run: RunDirectory) -> bool:
    return not processes.processes_of(run.path)


def test_a_run_from_launch_to_its_end(lab: Lab) -> None:
    """stdout has the run directory and nothing else, the ranks' output is in their logs, nothing is
    left behind.

    On the way, SIGHUP to the supervisor and to every process below it changes nothing.
    """
    process = lab.start("launch", configure(lab, "steps = 60\nfault = 'forks'"), "--headless")
    run = lab.newest()
    wait_for(lambda: training(run, 8))
    supervisor = lab.supervisor(run)
    for victim in (supervisor, *supervisor.children(recursive=True)):
        if victim.environ().get("RANK") is None or victim.ppid() != supervisor.pid:
            victim.send_signal(signal.SIGHUP)
    output, lines = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output == f"{run.path}\n"
    assert "ended" in lines and FINISHED in lines
    assert kinds(run) == ["started", "ended"]
    status = run.read_status()
    assert status is not None
    assert (status.phase, status.exit_code, status.restarts, status.world) == (
        Phase.FINISHED,
        0,
        0,
        2,
    )
    threads = max(1, processes.cores() // 2)
    for rank in (0, 1):
        assert (
            run.logs / f"rank-{rank}.log"
        ).read_text() == f"rank {rank} start 0 threads {threads} in /\n"
    assert nothing_left(run), "the child that rank 1 left behind in a session of its own"


def test_a_failed_rank_is_started_again(lab: Lab) -> None:
    result = lab.guardrail("launch", configure(lab, "fault = 'exit'"), "--headless")
    run = lab.newest()
    assert result.returncode == 0, result.stderr
    failure = next(event for event in run.events() if event.kind == "rank_failed")
    assert (failure.data["rank"], failure.data["exit"]) == (1, 1)
    assert "rank_failed" in result.stderr and "rank 1 exited with 1" in result.stderr
    log = (run.logs / "rank-1.log").read_text()
    assert "start 0" in log and LAST_LINE in log and "start 1" in log
    status = run.read_status()
    assert status is not None and (status.restarts, status.phase) == (1, Phase.FINISHED)


def test_the_exception_of_a_failed_rank_is_in_the_journal(lab: Lab) -> None:
    lab.guardrail("launch", configure(lab, "fault = 'record'"), "--headless")
    run = lab.newest()
    failure = next(event for event in run.events() if event.kind == "rank_failed")
    assert (failure.data["rank"], failure.data["error"]) == (1, "ValueError: too small")
    assert failure.data["error"] in failure.message
    assert not list(run.logs.glob("error*"))


def test_ranks_that_fail_too_often_end_the_run_with_4_and_say_why(lab: Lab) -> None:
    result = lab.guardrail(
        "launch", configure(lab, "fault = 'exit'\nstarts = 99\nrank = 0"), "--headless"
    )
    run = lab.newest()
    assert result.returncode == 4
    assert kinds(run).count("rank_failed") == 2, "launch.max_restarts = 1"
    last = run.events()[-1]
    assert (last.kind, last.data["phase"], last.data["exit_code"]) == ("ended", "failed", 4)
    assert "rank 0 exited with 1; failure 2, launch.max_restarts = 1" in last.message
    assert last.message.endswith(LAST_LINE)
    assert f"    {LAST_LINE}" in result.stderr
    status = run.read_status()
    assert status is not None and (status.phase, status.exit_code) == (Phase.FAILED, 4)
    assert nothing_left(run)


def test_a_refusal_of_the_ranks_is_not_tried_again(lab: Lab) -> None:
    result = lab.guardrail(
        "launch", configure(lab, "fault = 'usage'\nrank = 0", processes=1), "--headless"
    )
    run = lab.newest()
    assert result.returncode == 2
    assert kinds(run) == ["started", "ended"]


@pytest.mark.fault("R8")
def test_a_full_disk_ends_the_start_of_the_ranks_with_4_says_so_and_leaves_a_run_to_resume(
    lab: Lab,
) -> None:
    with small_file_system(lab.root, megabytes=40):  # 32 must be free at the start
        fake = "fault = 'full'\nrank = 0"
        result = lab.guardrail(
            "launch", configure(lab, fake, processes=1, restarts=0), "--headless"
        )
        run = lab.newest()
        assert result.returncode == 4
        sentence = f"{run.path} cannot be written: No space left on device"
        assert sentence in result.stderr and "Traceback" not in result.stderr
        status = run.read_status()
        assert status is not None and (status.phase, status.exit_code) == (Phase.FAILED, 4)
        assert sentence in status.disk
        assert nothing_left(run)
        (run.path.parent / "ballast").unlink()
        assert lab.guardrail("launch", "--resume", str(run.path), "--headless").returncode == 0
        status = run.read_status()
        assert status is not None and (status.phase, status.disk) == (Phase.FINISHED, "ok")


def test_ranks_that_end_without_a_word_count_as_failed(lab: Lab) -> None:
    result = lab.guardrail(
        "launch", configure(lab, "fault = 'silent'\nrank = 0", processes=1), "--headless"
    )
    run = lab.newest()
    assert result.returncode == 4
    assert run.events()[-1].data["phase"] == "failed"


def test_a_hung_rank_is_written_down_killed_and_started_again(lab: Lab) -> None:
    config = configure(lab, "fault = 'hang'\nsteps = 300", step_seconds=1.5)
    result = lab.guardrail("launch", config, "--headless")
    run = lab.newest()
    assert result.returncode == 0, result.stderr
    hung = next(event for event in run.events() if event.kind == "rank_hung")
    assert (hung.data["rank"], hung.data["phase"]) == (1, "step")
    assert "__main__.py" in hung.message
    assert "logs/rank-1.stacks" in hung.data["stacks"]
    assert "here_it_hangs" in (run.logs / "rank-1.stacks").read_text()
    assert kinds(run) == ["started", "rank_hung", "restarted", "ended"], (
        "what the supervisor killed did not fail by itself"
    )


def test_a_rank_that_is_stopped_cannot_answer_and_is_replaced_all_the_same(lab: Lab) -> None:
    config = configure(lab, "fault = 'freeze'\nsteps = 150\nlockstep = true", step_seconds=1.5)
    result = lab.guardrail("launch", config, "--headless")
    run = lab.newest()
    assert result.returncode == 0, result.stderr
    (hung,) = (event for event in run.events() if event.kind == "rank_hung")
    assert hung.data["rank"] == 1
    if '"MainThread"' in (run.logs / "rank-1.stacks").read_text():  # py-spy is there and may
        assert "__main__.py" in hung.message
    assert kinds(run)[-2:] == ["restarted", "ended"]


@pytest.mark.fault("R1")
def test_a_stopped_rank_that_holds_the_journal_is_killed_before_the_journal_is_written(
    lab: Lab,
) -> None:
    config = configure(lab, "fault = 'lock'\nsteps = 150\nlockstep = true", step_seconds=1.5)
    result = lab.guardrail("launch", config, "--headless")
    assert result.returncode == 0, result.stderr
    assert kinds(lab.newest()) == ["started", "rank_hung", "restarted", "ended"]


def test_sigterm_to_a_headless_launch_saves_and_ends_with_130(lab: Lab) -> None:
    process = lab.start("launch", configure(lab, "steps = 100000"), "--headless")
    run = lab.newest()
    wait_for(lambda: training(run, 3))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # `timeout` signals twice at once: that is one request
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert run.events()[-1].message == STOPPED
    saved = int((run.checkpoints / "fake-0").read_text())
    status = run.read_status()
    assert status is not None and (status.phase, status.exit_code, status.step) == (
        Phase.STOPPED,
        130,
        saved,
    )
    assert nothing_left(run)


def test_a_second_sigterm_ends_at_once(lab: Lab) -> None:
    process = lab.start("launch", configure(lab, "steps = 100000\nfault = 'deaf'"), "--headless")
    run = lab.newest()
    wait_for(lambda: training(run, 3))
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "note" in kinds(run))
    # one that comes sooner is taken for a repetition of the first
    time.sleep(DEBOUNCE_SECONDS + 0.2)
    assert process.poll() is None and not ended(run), "the first one waits for the ranks"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    last = run.events()[-1]
    assert last.data["exit_code"] == 130 and "stop_timeout" not in last.message
    assert nothing_left(run)


def test_ranks_that_do_not_stop_in_time_are_killed(lab: Lab) -> None:
    assert (
        lab.guardrail(
            "launch", configure(lab, "steps = 100000\nfault = 'deaf'", stop_seconds=1), "--detach"
        ).returncode
        == 0
    )
    run = lab.newest()
    wait_for(lambda: training(run, 3))
    lab.supervisor(run).send_signal(signal.SIGUSR1)
    wait_for(lambda: ended(run), seconds=30)
    assert "launch.stop_timeout = 1" in run.events()[-1].message
    status = run.read_status()
    assert status is not None and (status.phase, status.exit_code) == (Phase.STOPPED, 130)
    assert nothing_left(run)


def test_a_stop_before_any_rank_has_begun_ends_at_once(lab: Lab) -> None:
    """Signals to every process of the job, as a batch system sends them, must not count as failures
    of the ranks.
    """
    lab.guardrail("launch", configure(lab, "import_seconds = 600"), "--detach")
    run = lab.newest()
    supervisor = lab.supervisor(run)
    wait_for(lambda: len(processes.processes_of(run.path)) == 3, what="agent and two ranks")
    for process in (*processes.processes_of(run.path), supervisor):
        process.send_signal(signal.SIGTERM)
    wait_for(lambda: ended(run), seconds=30)
    last = run.events()[-1]
    assert last.data["phase"] == "stopped" and "stop_timeout" not in last.message
    assert "rank_failed" not in kinds(run)
    assert nothing_left(run)


def test_a_killed_elastic_agent_is_replaced_within_the_budget(lab: Lab) -> None:
    lab.guardrail("launch", configure(lab, "steps = 100000", restarts=1), "--detach")
    run = lab.newest()
    for start in ("started", "restarted"):
        wait_for(lambda start=start: start in kinds(run) and training(run))  # type: ignore[misc]
        (agent,) = lab.supervisor(run).children()
        ranks = agent.children()
        assert len(ranks) == 2
        agent.kill()
        wait_for(lambda gone=ranks: not any(processes.alive(rank) for rank in gone))  # type: ignore[misc]
    wait_for(lambda: ended(run))
    status = run.read_status()
    assert status is not None and (status.phase, status.exit_code) == (Phase.FAILED, 4)
    assert kinds(run).count("restarted") == 1
    assert " agent " in run.events()[-1].message and "SIGKILL" in run.events()[-1].message
    assert nothing_left(run)


def test_resume_after_the_supervisor_was_killed(lab: Lab) -> None:
    """Alive: refused. Supervisor dead, ranks alive: they save and stop, then the run goes on.
    Finished: says so.
    """
    lab.guardrail("launch", configure(lab, "steps = 300"), "--detach")
    run = lab.newest()
    wait_for(lambda: training(run, 3))
    refused = lab.guardrail("launch", "--resume", run.name, "--detach")
    assert (
        refused.returncode == 2
        and "is running" in refused.stderr
        and "guardrail attach" in refused.stderr
    )

    lab.supervisor(run).kill()
    orphans = processes.processes_of(run.path)
    assert len(orphans) == 3, "the elastic agent and two ranks go on training"
    result = lab.guardrail(
        "launch", "--resume", run.name, "--headless", "--set", "launch.max_restarts=7"
    )
    assert result.returncode == 0, result.stderr
    assert "processes of" in result.stderr
    started = run.events()[0]
    assert started.kind == "started" and started.message not in result.stderr, (
        "the past is not told again"
    )
    assert not any(processes.alive(orphan) for orphan in orphans)
    assert kinds(run)[-4:] == ["started", "ended", "restarted", "ended"]
    stopped, again = (
        event
        for event in run.events()
        if event.kind in ("ended", "restarted")
        if event.seq < run.events()[-1].seq
    )
    assert stopped.data["phase"] == "stopped" and again.step == stopped.step, "not a step is lost"
    assert again.message in result.stderr
    assert "max_restarts = 7" in run.config_text()

    finished = lab.guardrail("launch", "--resume", str(run.path))
    assert finished.returncode == 0
    assert finished.stderr.startswith(f"{run.name} ")
    assert numbers_in(finished.stderr.removeprefix(run.name)) == [300]
    other = lab.guardrail("launch", "--resume", run.name, "--set", "fake.steps=9")
    assert other.returncode == 2 and "--set: fake.steps: " in other.stderr


def test_ctrl_c_leaves_and_attach_comes_back(lab: Lab) -> None:
    process = lab.start("launch", configure(lab, "steps = 150"), "--headless")
    run = lab.newest()
    wait_for(lambda: training(run, 3))
    process.send_signal(signal.SIGINT)
    _, lines = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "training continues" in lines and f"guardrail attach {run.path}" in lines
    assert not ended(run)
    back = lab.guardrail("attach")
    assert back.returncode == 0 and FINISHED in back.stderr


def launch_on_terminal(lab: Lab, config: str) -> tuple[subprocess.Popen[bytes], int]:
    """Launch a run on a terminal of its own; returns the command and that terminal's other end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "guardrail", "launch", config, "--headless"],
        cwd=lab.folder,
        env=lab.environment(),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=lambda: _take_terminal(slave),
    )
    os.close(slave)
    return process, master


def test_a_terminal_that_stops_reading_and_one_that_closes(lab: Lab) -> None:
    """Nobody reads the megabyte that launch wants to print, then the terminal is gone: the run
    finishes.
    """
    config = configure(lab, "fault = 'chatty'\nrank = 0\nsteps = 60", processes=1)
    process, terminal = launch_on_terminal(lab, config)
    try:
        run = lab.newest()
        wait_for(lambda: ended(run))
        assert process.poll() is None, "it is still waiting for its reader"
        status = run.read_status()
        assert status is not None and (status.phase, status.exit_code) == (Phase.FINISHED, 0)
        os.close(terminal)
        assert process.wait(30) in (0, 130)
    finally:
        process.kill()
        process.wait()


def test_closing_the_terminal_leaves_the_run_alone(lab: Lab) -> None:
    config = configure(lab, "steps = 150", processes=1)
    process, terminal = launch_on_terminal(lab, config)
    run = lab.newest()
    wait_for(lambda: training(run, 3))
    os.close(terminal)
    assert process.wait(30) == 130
    assert not ended(run)
    wait_for(lambda: ended(run))
    assert run.events()[-1].message == FINISHED


def test_the_screen_is_left_with_q_and_training_goes_on(lab: Lab) -> None:
    config = configure(lab, "steps = 400", processes=1)
    arguments = ["-m", "guardrail", "launch", config]
    environment = lab.environment(TERM="xterm-256color")
    screen = pexpect.spawn(
        sys.executable,
        arguments,
        cwd=str(lab.folder),
        env=environment,
        dimensions=(32, 120),
        timeout=60,
    )
    try:
        run = lab.newest()
        screen.expect_exact(str(run.path))
        screen.expect_exact("\x1b[?1049h")  # the alternate screen
        wait_for(lambda: training(run, 3))
        screen.send("q")
        screen.expect_exact("training continues")
        screen.expect_exact(f"guardrail attach {run.path}")
        screen.expect(pexpect.EOF)
        screen.wait()
        assert screen.exitstatus == 0
        assert not ended(run)
    finally:
        screen.close(force=True)
    back = lab.guardrail("attach", run.name)
    assert back.returncode == 0


def _take_terminal(slave: int) -> None:
    """Make the pty the controlling terminal, so that its end is a SIGHUP."""
    import fcntl

    # whoever runs the tests under nohup ignores it, and so would we
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def test_two_nodes_share_a_run_directory(lab: Lab) -> None:
    """Two supervisors find each other by the rendezvous of [launch]; the first one speaks for the
    run.
    """
    endpoint = f"127.0.0.1:{free_port()}"
    config = configure(lab, "steps = 200\nrank = 3\nfault = 'exit'\nlockstep = true")
    (lab.folder / config).write_text(
        (lab.folder / config)
        .read_text()
        .replace("[tensor", f'nodes = 2\nrendezvous_endpoint = "{endpoint}"\n[tensor')
    )
    place = str(lab.root / "fake" / "shared")
    alone = lab.guardrail("launch", config, "--detach", "--set", "launch.node_rank=1")
    assert alone.returncode == 2 and "--run-dir" in alone.stderr
    second = lab.start(
        "launch", config, "--headless", "--run-dir", place, "--set", "launch.node_rank=1"
    )
    first = lab.start("launch", config, "--headless", "--run-dir", place)
    outputs = [node.communicate(timeout=90) for node in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    run = RunDirectory.open(place)
    assert {file.name for file in run.logs.glob("rank-?.log")} == {
        f"rank-{rank}.log" for rank in range(4)
    }
    assert "node_rank = 0" in run.config_text()
    assert [event.data["rank"] for event in run.events() if event.kind == "rank_failed"] == [3]
    status = run.read_status()
    assert status is not None and (status.phase, status.exit_code, status.world) == (
        Phase.FINISHED,
        0,
        4,
    )


def test_only_one_supervisor_for_a_run(lab: Lab) -> None:
    lab.guardrail("launch", configure(lab, "steps = 100000", processes=1), "--detach")
    run = lab.newest()
    wait_for(lambda: training(run))
    second = subprocess.run(
        [sys.executable, "-m", "guardrail.launch.supervisor", str(run.path)],
        env=lab.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2 and "already running (the supervisor" in second.stdout
    assert training(run)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_run_dir_is_taken_as_it_is_and_never_over_something_else(
    lab: Lab, where: str, tmp_path: Path
) -> None:
    target = tmp_path / "here"
    if where == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    result = lab.guardrail("launch", configure(lab), "--run-dir", str(target), "--detach")
    assert result.returncode == 2 and str(target) in result.stderr
