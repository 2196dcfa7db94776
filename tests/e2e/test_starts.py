"""Nothing of one start of the ranks reaches the next: a real supervisor over an elastic agent that
plays a scene.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guardrail.core.events.event import Event
from guardrail.rundir.run_directory import RunDirectory
from tests.support.places import ROOT

# The supervisor with another agent and shorter deadlines, in a process of its own: it ends all of
# its children.
SUPERVISOR = """
import sys
from guardrail.launch import supervisor, survivors, torchrun
assert torchrun.build_command and supervisor.POLL_SECONDS and survivors.SURVIVOR_SECONDS
torchrun.build_command = lambda launch, **_: [sys.executable, "-c", sys.argv[2]]
supervisor.POLL_SECONDS = 0.1
survivors.SURVIVOR_SECONDS, survivors.SETUP_SURVIVOR_SECONDS = 0.5, 0.2
sys.exit(supervisor.main([sys.argv[1]]))
"""
# What the agents of these tests have in common. A rank is a process that ignores the signal that
# asks it to end.
AGENT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run = Path(os.environ["GUARDRAIL_RUN"])
def start(rank):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "RANK": str(rank)})
def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
def say(line):
    print("E1125 03:08:38.098000 7032 torch/api.py:1]", line, flush=True)
def closes(rank):
    say(f"Sending process {rank.pid} closing signal SIGTERM")
def failed(rank, local_rank):
    say(f"failed (exitcode: {rank.returncode}) local_rank: {local_rank} (pid: {rank.pid}) of binary: /bin/sh")
def verdict(**words):
    (run / "verdict.json").write_text(json.dumps(words))
"""


def play(folder: Path, scene: str, *, nodes: int = 1) -> tuple[dict[str, object], list[Event], str]:
    """Run a supervisor over an agent that plays `scene`: (its verdict, the journal, what the
    supervisor logged).
    """
    endpoint = 'rendezvous_endpoint = "127.0.0.1:9"\n' if nodes > 1 else ""
    run = RunDirectory.create_at(
        folder / "run",
        f"[launch]\nprocesses = 2\nnodes = {nodes}\n{endpoint}max_restarts = 1\n[tensorboard]\nenabled = false\n",
    )
    process = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, str(run.path), AGENT + scene],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    words = run.path / "verdict.json"
    assert words.exists(), process.stdout + process.stderr
    return json.loads(words.read_text()), run.events(), process.stdout


@pytest.mark.fault("R2")
def test_the_ranks_of_the_next_start_outlive_a_failure_of_the_last(tmp_path: Path) -> None:
    """The agent has started the ranks again when its line about the failure is read."""
    verdict, events, log = play(
        tmp_path,
        """
ranks = [start(0), start(1)]
time.sleep(1.0)
for rank in ranks:
    rank.kill(), rank.wait()
ranks, old = [start(0), start(1)], ranks
time.sleep(1.0)
failed(old[1], 1)
time.sleep(2.0)
verdict(alive=[rank.poll() is None for rank in ranks])
""",
        nodes=2,
    )
    assert verdict == {"alive": [True, True]}
    assert [event.kind for event in events if event.kind != "ended"] == ["rank_failed"]
    (failure,) = (line for line in log.splitlines() if "launch.max_restarts = 1: rank 1 " in line)
    assert "failure 1, " in failure and "SIGKILL" in failure and "failure 2" not in log


@pytest.mark.fault("R6")
def test_a_death_is_noticed_while_a_peer_is_in_set_up(tmp_path: Path) -> None:
    """The agent waits for the peer, which does not end: it is killed as soon as the rank's death is
    known.
    """
    verdict, events, _ = play(
        tmp_path,
        """
ranks = [start(0), start(1)]
time.sleep(1.0)
ranks[0].kill(), ranks[0].wait()
closes(ranks[1])
try:
    ranks[1].wait(timeout=10)
finally:
    verdict(peer=ranks[1].poll())
failed(ranks[0], 0)
""",
    )
    assert verdict == {"peer": -9}
    assert [event.data["rank"] for event in events if event.kind == "rank_failed"] == [0]


@pytest.mark.fault("R1", "R2")
def test_one_node_starts_its_ranks_again_under_another_agent(tmp_path: Path) -> None:
    """Two failures, two agents, one count for each, whatever else is printed of a start that has
    failed.
    """
    verdict, events, log = play(
        tmp_path,
        """
rank = start(1)
time.sleep(0.5)
rank.kill(), rank.wait()
failed(rank, 1), failed(rank, 1)
first = run / "first"
verdict(again=first.exists(), incarnation=os.environ["GUARDRAIL_INCARNATION"])
first.touch()
sys.exit(1)
""",
    )
    assert verdict == {"again": True, "incarnation": "1"}
    assert [event.kind for event in events] == ["rank_failed", "rank_failed", "ended"]
    assert "failure 2, launch.max_restarts = 1" in events[-1].message and "failure 3" not in log


@pytest.mark.parametrize("phase", ["halted", "step"])
def test_what_a_rank_does_after_it_has_ended_the_run_changes_nothing(
    tmp_path: Path, phase: str
) -> None:
    """A halt is not undone by another start because a rank crashes on its way out. But where a rank
    dies in training, the others' last word is no end of the run: the agent's signal stops them.
    """
    verdict, events, _ = play(
        tmp_path,
        f"""
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.core.records.status import Phase
from guardrail.rundir.run_directory import RunDirectory
code = "import os, time; from guardrail.rundir.heartbeat import Heartbeat;" \
    "from guardrail.core.records.status import Phase;" \
    "from guardrail.rundir.run_directory import RunDirectory;" \
    "heart = Heartbeat(RunDirectory(os.environ['GUARDRAIL_RUN']), 1);" \
    "heart.at(Phase('{phase}')); heart.stop(); time.sleep(600)"
rank = subprocess.Popen([sys.executable, "-c", code])
journal = RunDirectory.open(run)
wait_for(lambda: any(one.phase.value == "{phase}" for one in journal.read_ranks()))
journal.append("ended", "halted by the guard", phase="halted", exit_code=3)
rank.kill(), rank.wait()
failed(rank, 1)
verdict(incarnation=os.environ["GUARDRAIL_INCARNATION"])
sys.exit(1)
""",
    )
    assert verdict == {"incarnation": "0" if phase == "halted" else "1"}
    assert next(event.data["phase"] for event in events if event.kind == "ended") == "halted"
