"""Asked to stop by a signal to one rank alone, in any phase: saved and ended, and resumed to the
very same end.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import guardrail.rundir.stop_signals
import guardrail.torch.checkpoint.disk_checkpoints
import guardrail.torch.checkpoint.loader
import trainer.loop.corpus_setup
import trainer.parallel.data_parallel
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import KILLED
from tests.support.lab import wait_for
from tests.support.ranks import wait_ranks
from tests.support.running import (
    BLIND,
    LENGTH,
    assert_same,
    assert_whole,
    new_run,
    of_kind,
    outcome,
    start_run,
    table,
    tiny,
    train,
    trained,
)
from trainer.config.config import Config
from trainer.loop.evaluation import Evaluation
from trainer.train import Trainer

STEPS = 30
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}


def config_of(
    folder: Path, *, world: int = 2, strategy: str = "ddp", **train_settings: Any
) -> Config:
    """A rollback lies at step 21, evaluations at 10, 20, 30, checkpoints at 0, 20, 30."""
    return tiny(
        folder,
        world=world,
        strategy=strategy,
        faults=[{"kind": "spike_loss", "first": 160, "last": 184, "value": 50.0}],
        guard=BLIND,
        data={"eval_fraction": 0.1},
        train={"steps": STEPS, "eval_every": 10, "eval_batches": 3, **train_settings},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDirectory]:
    known: dict[str, RunDirectory] = {}

    def run_of(strategy: str = "ddp") -> RunDirectory:
        if strategy not in known:
            known[strategy] = trained(
                config_of(tmp_path_factory.mktemp(strategy), strategy=strategy)
            )
        return known[strategy]

    return run_of


def me(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


# Each of these makes rank `rank` send itself `number` in one phase. They are patched in before the
# ranks are forked.


def in_tokenizing(patch: pytest.MonkeyPatch, number: int, rank: int) -> None:
    name = "wait_for_corpus" if rank else "prepare_corpus"  # only the first rank of a node builds
    whole = getattr(trainer.loop.corpus_setup, name)

    def signalled(*arguments: Any, **settings: Any) -> Path:
        # A forked rank needs milliseconds to get here, in which another may not even have begun.
        run = RunDirectory.open(os.environ["GUARDRAIL_RUN"])
        wait_for(lambda: len(run.read_ranks()) == 2, what="both ranks")
        os.kill(os.getpid(), number)
        return Path(whole(*arguments, **settings))

    patch.setattr(trainer.loop.corpus_setup, name, signalled)


def in_step(patch: pytest.MonkeyPatch, number: int, rank: int) -> None:
    whole = Trainer.train_step

    def signalled(self: Trainer, step: Any) -> None:
        if step.number == 15 and me(rank):
            os.kill(os.getpid(), number)
        whole(self, step)

    patch.setattr(Trainer, "train_step", signalled)


def in_evaluation(patch: pytest.MonkeyPatch, number: int, rank: int) -> None:
    run, sum_losses = Evaluation.run, Evaluation.sum_losses
    evaluated, sent = [], []

    def noted(self: Evaluation, guard: Any) -> None:
        evaluated.append(guard.step)
        run(self, guard)
        evaluated.clear()

    def signalled(self: Evaluation, *arguments: Any) -> Any:
        if evaluated == [20] and me(rank) and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return sum_losses(self, *arguments)

    patch.setattr(Evaluation, "run", noted)
    patch.setattr(Evaluation, "sum_losses", signalled)


def in_save(patch: pytest.MonkeyPatch, number: int, rank: int) -> None:
    whole = guardrail.torch.checkpoint.disk_checkpoints.write_share

    def signalled(job: Any) -> Any:
        if job.snapshot.step == 20 and me(rank):
            os.kill(os.getpid(), number)
        return whole(job)

    patch.setattr(guardrail.torch.checkpoint.disk_checkpoints, "write_share", signalled)


CASES = [
    (in_tokenizing, "SIGTERM", 0, "ddp"),
    (in_tokenizing, "SIGUSR1", 1, "ddp"),
    (in_step, "SIGTERM", 1, "ddp"),
    pytest.param(in_step, "SIGUSR1", 1, "fsdp", marks=pytest.mark.ci_slow),
    (in_evaluation, "SIGUSR1", 0, "ddp"),
    pytest.param(in_evaluation, "SIGTERM", 1, "fsdp", marks=pytest.mark.ci_slow),
    (in_save, "SIGTERM", 1, "ddp"),
]


@pytest.mark.parametrize(("phase", "name", "rank", "strategy"), CASES)
def test_stopped_in(
    tmp_path: Path,
    undisturbed: Callable[..., RunDirectory],
    phase: Callable[..., None],
    name: str,
    rank: int,
    strategy: str,
) -> None:
    whole = undisturbed(strategy)
    run = new_run(config_of(tmp_path, strategy=strategy))
    with pytest.MonkeyPatch.context() as patch:
        phase(patch, SIGNALS[name], rank)
        assert train(run, 2) == "stopped"
    status = run.read_status()
    assert status is not None and status.phase is Phase.STOPPED
    reached = status.step
    if phase is in_tokenizing:
        assert not len(run.metrics())
    else:
        assert checkpoint_dirs(run.checkpoints)[0].name.startswith(f"step-{reached:08d}")
        (ended,) = of_kind(run, "ended")
        assert (
            ended.data["saved"] and "1 of 2 ranks" in ended.message
        ) or "unfinished batch" in ended.message
    # In the middle of a window ddp gives the batch back; fsdp would have to reduce what it has, and
    # finishes it.
    expected = {in_tokenizing: 0, in_step: 14 if strategy == "ddp" else 15, in_evaluation: 20}
    assert reached == expected.get(phase, reached) and reached < STEPS
    if phase is in_evaluation:
        assert [event.step for event in of_kind(run, "eval")] == [10]
    assert train(run, 2) == "finished"
    assert_whole(run)
    assert_same(run, whole)


@pytest.mark.fault("R6")
def test_the_signal_of_the_elastic_agent_is_no_stop_of_the_run(tmp_path: Path) -> None:
    """Another rank has failed in set-up. The supervisor lives and has asked for no stop: it would
    send SIGUSR1.
    """
    run = new_run(config_of(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        in_tokenizing(patch, signal.SIGTERM, 0)
        patch.setenv("GUARDRAIL_SUPERVISOR_PID", str(os.getpid()))
        patch.setattr("trainer.__main__.SUPERVISOR_SECONDS", 0.2, raising=False)
        pids = start_run(run, 2)
        assert wait_ranks(pids[:1]) == [KILLED]
        os.kill(pids[1], signal.SIGKILL)  # what becomes of the others of a start that has failed
        wait_ranks(pids[1:])
    assert of_kind(run, "ended") == []


def test_a_resume_that_is_stopped_in_setup_ends_at_the_step_of_the_start_before(
    tmp_path: Path,
) -> None:
    run = new_run(config_of(tmp_path))
    run.append("started", step=0)
    run.append("ended", step=30, timeline=2, phase="stopped", exit_code=130)
    with pytest.MonkeyPatch.context() as patch:
        in_tokenizing(patch, signal.SIGUSR1, 0)
        assert train(run, 2) == "stopped"
    newest = run.events()[-1]
    assert (newest.kind, newest.step, newest.timeline, newest.data["phase"]) == (
        "ended",
        30,
        2,
        "stopped",
    )


@pytest.mark.parametrize("name", list(SIGNALS))
def test_stopped_while_paused(
    tmp_path: Path, undisturbed: Callable[..., RunDirectory], name: str
) -> None:
    whole = undisturbed()
    run = new_run(config_of(tmp_path))
    run.send(Command(id="pause", kind="pause", at_step=12))
    pids = start_run(run, 2)
    wait_for(lambda: of_kind(run, "paused"), what="a pause")
    wait_for(
        lambda: (s := run.read_status()) is not None and s.phase is Phase.PAUSED,
        what="a paused status",
    )
    os.kill(pids[1], SIGNALS[name])
    assert wait_ranks(pids) == [0, 0]
    assert outcome(run) == "stopped"
    assert len(table(run)) == 12
    assert train(run, 2) == "finished"
    assert_same(run, whole)


def test_a_window_is_given_back_within_one_micro_batch(tmp_path: Path) -> None:
    config = config_of(tmp_path, micro_batch_size=1)
    assert config.micro_batches == 4
    run = new_run(config)
    counted = tmp_path / "counted"
    with pytest.MonkeyPatch.context() as patch:
        whole = trainer.parallel.data_parallel.loss_sum

        def counting(logits: Any, labels: Any) -> Any:
            if torch.is_grad_enabled() and me(1):
                with counted.open("a") as file:
                    file.write("x")
            return whole(logits, labels)

        patch.setattr(trainer.parallel.data_parallel, "loss_sum", counting)
        in_step(patch, signal.SIGTERM, 1)
        assert train(run, 2) == "stopped"
    assert len(counted.read_text()) == 14 * 4 + 1
    assert len(table(run)) == 14
    tokens = table(run, ("tokens",))
    assert (tokens == 8 * LENGTH).all()


def test_a_second_sigterm_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardrail.rundir.stop_signals, "DEBOUNCE_SECONDS", 0.1)
    # the last of the window is never given back
    hang = {"kind": "hang", "step": 5, "micro": 1, "value": 60.0}
    run = new_run(tiny(tmp_path, faults=[hang]))
    pids = start_run(run, 1)
    wait_for(lambda: len(run.metrics()) >= 4, what="step 4")
    # Two that come at the same time are one for the kernel: there must be a moment between them.
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(0.2)
    assert os.waitpid(pids[0], os.WNOHANG) == (0, 0)
    os.kill(pids[0], signal.SIGTERM)
    assert wait_ranks(pids, seconds=30) == [KILLED]
    assert outcome(run) == ""


def test_the_end_of_an_earlier_start_stops_nobody(tmp_path: Path) -> None:
    """A rank that waits for the corpus reads the status of rank 0, and finds the last word of the
    run it resumes.

    Clocks cannot tell them apart: the age of a process is known to a second, and hosts differ.
    """
    config = config_of(tmp_path)
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=17))
    assert train(run, config.world) == "stopped"
    status = run.read_status()
    assert status is not None and status.phase is Phase.STOPPED and status.start
    run.write_status(msgspec.structs.replace(status, heartbeat=time.time() + 30.0))
    assert train(run, config.world) == "finished"


# -- nobody waits in a collective for slow work of another rank


class Meetings:
    """Holds slow work of rank 0 up until rank 1 has called three collectives meanwhile.

    A rank that waits for that work inside one collective calls no other: the work is never let go
    of then.
    """

    def __init__(self, folder: Path) -> None:
        self._begun, self._met = folder / "begun", folder / "met"
        self._count = 0

    def counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            if me(1) and self._begun.exists() and not self._met.exists():
                self._count += 1
                if self._count >= 3:
                    self._met.touch()
            return collective(*given, **named)

        return counting

    def held_up(self, work: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def waiting(*given: Any, **named: Any) -> Any:
            if me(0) and when(*given):
                self._met.unlink(missing_ok=True)
                self._begun.touch()
                wait_for(self._met.exists, seconds=20, what="rank 1 not to wait in a collective")
                self._begun.unlink(missing_ok=True)
            return work(*given, **named)

        return waiting

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
            patch.setattr(torch.distributed, name, self.counted(getattr(torch.distributed, name)))


@pytest.mark.fault("E4")
def test_no_rank_waits_in_a_collective_for_a_slow_disk_of_another(tmp_path: Path) -> None:
    """A save that a stop asks for, the hashes of it at the resume, and the save at the end."""
    run = new_run(tiny(tmp_path, world=2, train={"steps": 8}, launch={"collective_seconds": 40.0}))
    run.send(Command(id="stop", kind="stop", at_step=6))
    meetings = Meetings(tmp_path)
    checkpoints, loading = (
        guardrail.torch.checkpoint.disk_checkpoints,
        guardrail.torch.checkpoint.loader,
    )
    with pytest.MonkeyPatch.context() as patch:
        meetings.watch(patch)
        slow_save = meetings.held_up(
            checkpoints.write_share, lambda job: job.snapshot.step in (6, 8)
        )
        patch.setattr(checkpoints, "write_share", slow_save)
        patch.setattr(loading, "verify", meetings.held_up(loading.verify, lambda *_: True))
        assert train(run, 2) == "stopped"
        assert checkpoint_dirs(run.checkpoints)[0].name == "step-00000006"
        assert train(run, 2) == "finished"
    (restarted,) = of_kind(run, "restarted")
    assert restarted.step == 6
    assert_whole(run)
