"""Several nodes: supervisors that meet by torch elastic's rendezvous, here on loopback, and what a
lost one costs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
import torch

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError, UsageError
from guardrail.core.records.status import Phase
from guardrail.core.sections import LaunchSection
from guardrail.core.toml_file import dump_toml
from guardrail.decide.sample_order import SampleOrder
from guardrail.launch.launcher import load_settings, prepare_resume
from guardrail.rundir import processes
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import holder_of
from guardrail.rundir.stop_signals import StopSignals
from guardrail.torch.guard.guard import Guard
from tests.support.lab import Lab, wait_for
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.ranks import run_ranks
from tests.support.running import assert_same, new_run, of_kind, tiny, trained, write_corpus
from tests.support.texts import numbers_in
from trainer.config.config import Config
from trainer.loop import corpus_setup
from trainer.loop.corpus_setup import CorpusSetup
from trainer.train import Trainer

STEPS = 150


def config_of(folder: Path, **launch: object) -> Config:
    return tiny(
        folder,
        world=2,
        strategy="fsdp",
        launch=launch,
        train={"steps": STEPS},
        checkpoint={"every": 10, "keep": 2},
    )


def supervisor_pid(run: RunDirectory, node: int) -> int:
    """0 where none lives."""
    lock = run.path / f"supervisor-{node}.lock"
    holder = holder_of(lock) if lock.exists() else None
    return holder.pid if holder is not None else 0


def reached(run: RunDirectory, step: int) -> bool:
    status = run.read_status()
    return status is not None and status.phase is Phase.STEP and status.step >= step


def lose(run: RunDirectory, node: int, client: subprocess.Popen[str]) -> None:
    """End a node as a power failure does: everything that stands on it, at once."""
    supervisor = psutil.Process(supervisor_pid(run, node))
    assert (
        processes.kill(
            [psutil.Process(client.pid), supervisor, *supervisor.children(recursive=True)]
        )
        == []
    )
    client.communicate()


@pytest.mark.slow
@pytest.mark.ci_slow
@pytest.mark.parametrize("lost", [1, 0])
def test_a_node_that_was_lost_comes_back_and_no_bit_differs(lost: int, lab: Lab) -> None:
    """Node 0 holds the place where the nodes meet; without it the other one waits for it to be
    there again.
    """
    endpoint = f"127.0.0.1:{free_port()}"
    config = config_of(
        lab.folder, processes=1, nodes=2, rendezvous_endpoint=endpoint, max_restarts=2
    )
    (lab.folder / "c.toml").write_text(dump_toml(config))
    place = str(lab.root / "nodes" / "shared")
    nodes = [
        lab.start(
            "launch",
            "c.toml",
            "--headless",
            "--run-dir",
            place,
            "--set",
            f"launch.node_rank={node}",
        )
        for node in (0, 1)
    ]
    wait_for(lambda: (Path(place) / "config.toml").exists(), what="a run directory")
    run = RunDirectory.open(Path(place))
    wait_for(lambda: reached(run, 25), seconds=120, what="training on both nodes")
    alive = supervisor_pid(run, 1 - lost)
    lose(run, lost, nodes[lost])
    noticed = ("rank_failed", "note")[lost == 0]
    wait_for(lambda: of_kind(run, noticed), what="the node that is left notices")
    again = ["--set", f"launch.node_rank={lost}"] if lost else []
    nodes[lost] = lab.start("launch", "--resume", place, "--headless", *again)
    wait_for(lambda: of_kind(run, "restarted"), seconds=120, what="training on both nodes again")
    assert supervisor_pid(run, 1 - lost) == alive, "the one that came back has ended the other"
    outputs = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (restart,) = of_kind(run, "restarted")
    assert restart.data["checkpoint"] and 0 < restart.step < STEPS
    assert not processes.processes_of(run.path)
    assert_same(trained(config_of(lab.folder)), run)


def refusal_on_node(rank: int, folder: Path) -> str:
    """What a rank that is alone on its node says of the text there; "" when it trains on it."""
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: f"node-{rank}"
    config = tiny(folder / f"node-{rank}", world=2)
    write_corpus(Path(config.data.sources[0]), bad=[7] if rank else [])
    try:
        Trainer(config)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.fault("A5")
def test_nodes_with_different_text_are_refused_and_both_are_named(tmp_path: Path) -> None:
    first, second = run_ranks(refusal_on_node, 2, tmp_path, folder=tmp_path / "results", init=False)
    assert first == second
    assert "rank 0 (node-0)" in first and "rank 1 (node-1)" in first and " data " in first


def refusal_of_guard(rank: int) -> str:
    model = torch.nn.Linear(2, 2)
    guard = Guard.from_config(
        GuardConfig(),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data=SampleOrder(samples=10, seed=rank),
        batch_size=2,
        total_steps=1,
    )
    try:
        next(iter(guard))
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.fault("A5")
def test_a_loop_whose_ranks_would_draw_different_batches_is_refused(tmp_path: Path) -> None:
    first, second = run_ranks(refusal_of_guard, 2, folder=tmp_path)
    assert first == second and "seed" in first.split(" is ")[0]
    assert numbers_in(first) == [0, 0, 1, 1], "each seed and its rank"


@pytest.mark.fault("E4")
def test_a_node_that_is_ready_waits_for_the_text_of_the_others_outside_of_any_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of both nodes are threads here; nothing but the run directory lies between them."""
    config = config_of(tmp_path, processes=1, nodes=2, rendezvous_endpoint="127.0.0.1:1")
    run = new_run(config)

    def node() -> CorpusSetup:
        return CorpusSetup(config, run=run, signals=StopSignals(), heartbeat=None)

    prepared, done, prepare = threading.Event(), threading.Event(), corpus_setup.prepare_corpus
    monkeypatch.setattr(
        corpus_setup, "prepare_corpus", lambda *a, **n: (prepare(*a, **n), prepared.set())[0]
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("GROUP_RANK", "1")
    waiting = threading.Thread(target=lambda: (node().prepare(), done.set()), daemon=True)
    waiting.start()
    assert prepared.wait(60)
    assert not done.wait(0.5), "it has met the others before all corpora are there"
    monkeypatch.setenv("GROUP_RANK", "0")
    assert node().prepare().is_dir()
    assert done.wait(60)
    waiting.join()


def test_only_what_a_dead_supervisor_has_left_is_an_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes may stand on one host: the one that comes back must leave the other's ranks
    alone.
    """
    run = tmp_path / "run"
    run.mkdir()
    code = "import time; time.sleep(600)"
    children = []
    try:
        for supervisor in (7, 8):
            variables = {
                processes.RUN_VARIABLE: str(run),
                processes.SUPERVISOR_VARIABLE: str(supervisor),
            }
            children.append(subprocess.Popen(["python3", "-c", code], env=variables))
        monkeypatch.setattr(
            processes,
            "supervisor_of",
            lambda path, pid: psutil.Process() if (path, pid) == (run, 8) else None,
        )
        wait_for(lambda: len(processes.processes_of(run)) == 2)
        assert [process.pid for process in processes.orphans_of(run)] == [children[0].pid]
    finally:
        for child in children:
            child.kill()
            child.wait()


# -- demo/slurm.sbatch

SLURM = ROOT / "demo" / "slurm.sbatch"
STUBS = {
    "scontrol": 'test "$1 $2 $3" = "show hostnames node-[07,12]"; echo node-07; echo node-12',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; for n in 0 1; do (SLURM_NODEID=$n "$@"); done',
    "guardrail": 'for word; do printf "%s\\0" "$word"; done >"$PWD/told-$SLURM_NODEID"',
}


def slurm(folder: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """What the script has each of two nodes call, by a Slurm that only says what it was asked."""
    for name, body in STUBS.items():
        stub = folder / "venv" / "bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/bin/bash\nset -eu\nexport SLURM_NODEID=${{SLURM_NODEID-}}\n{body}\n")
        stub.chmod(0o755)
    (folder / "venv" / "bin" / "activate").write_text("")
    variables |= {
        "PATH": f"{folder / 'venv' / 'bin'}:/usr/bin:/bin",
        "VENV": str(folder / "venv"),
        "SLURM_JOB_ID": "104711",
        "SLURM_JOB_NODELIST": "node-[07,12]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    done = subprocess.run(
        ["bash", str(SLURM), *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / f"told-{node}").read_text().split("\0")[:-1] for node in (0, 1)]


def test_the_slurm_script_starts_and_resumes_what_the_command_line_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardrail.cli.launch import command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(
        '[train]\nsteps = 1000\nbatch_size = 16\n[launch]\ndevice = "cpu"\n'
    )
    for node, (name, *words) in enumerate(slurm(tmp_path, "c.toml")):
        assert name == "launch"
        options = command.make_context(name, words).params
        assert options["headless"] and options["run_dir"] == str(
            tmp_path / "runs" / "slurm" / "104711"
        )
        config = load_settings(options["config"], options["overrides"])
        assert isinstance(config, Config)
        assert (config.launch.nodes, config.launch.node_rank, config.world) == (2, node, 16)
        assert config.launch.rendezvous_endpoint == "node-07:24711"

    run = RunDirectory.create_at(tmp_path / "before", dump_toml(config_of(tmp_path)))
    for node, (name, *words) in enumerate(slurm(tmp_path, RUN=str(run.path))):
        options = command.make_context(name, words).params
        assert options["config"] is None and options["run_dir"] is None
        monkeypatch.setattr("guardrail.launch.preflight.count_cuda_devices", lambda: 8)
        # 16 ranks share out a batch of 8 badly, and say so: what the job gives reaches the run's
        # own configuration.
        with pytest.raises(ConfigError) as caught:
            prepare_resume(options["resume"], options["overrides"], root="")
        assert (caught.value.key, caught.value.value) == ("train.batch_size", 8)
        assert numbers_in(caught.value.expected)[0] == 16
        assert f"launch.node_rank={node}" in options["overrides"]


def test_every_line_of_the_slurm_script_is_explained() -> None:
    explained = ""
    for line in SLURM.read_text().splitlines():
        if line.startswith("# ") or not line:
            explained = line
        elif line.startswith("#SBATCH"):
            assert explained.startswith("# "), line
    assert "#SBATCH --signal=TERM@420" in SLURM.read_text()
    assert LaunchSection().stop_seconds < 420
