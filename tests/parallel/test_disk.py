"""A disk that fills up, and checkpoints that do not hold: training goes on, says so, and loses
nothing it can keep.
"""

import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import guardrail.torch.checkpoint.commit
import guardrail.torch.checkpoint.rank_share
from guardrail.core.errors import DiskRefuses, ExitCode
from guardrail.core.records.commands import Command
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import LaunchSection
from guardrail.launch import supervisor_journal as chronicle
from guardrail.launch.launcher import prepare_resume
from guardrail.launch.supervisor_journal import SupervisorJournal
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import MANIFEST, read_manifest
from guardrail.rundir.metrics import MetricsWriter
from guardrail.rundir.run_directory import RunDirectory
from tests.support.lab import fill, small_file_system, wait_for
from tests.support.ranks import start_ranks, wait_ranks
from tests.support.running import (
    BLIND,
    assert_same,
    assert_whole,
    new_run,
    of_kind,
    outcome,
    prompt_disk,
    rank_main,
    start_run,
    tiny,
    train,
    trained,
)
from trainer.config.config import Config
from trainer.train import Trainer

SPIKE = {"kind": "spike_loss", "first": 160, "last": 184, "value": 50.0}  # a rollback at step 21


def config_of(folder: Path, *, root: Path | None = None, **sections: Any) -> Config:
    return tiny(
        folder,
        world=2,
        run={"root": str(root or folder / "runs")},
        faults=[SPIKE],
        guard=BLIND,
        train={"steps": 50},
        checkpoint={"every": 10, "keep": 2, "retry_seconds": 0.05},
        **sections,
    )


def at_steps(patch: pytest.MonkeyPatch, **deeds: Callable[[], None]) -> None:
    """Have rank 0 do `deeds` before its first attempt at a step: s12=..., s30=..."""
    whole = Trainer.train_step

    def interrupted(self: Trainer, step: Any) -> None:
        deed = deeds.pop(f"s{step.number}", None)
        if deed is not None and self.rank == 0:
            deed()
        whole(self, step)

    patch.setattr(Trainer, "train_step", interrupted)


def disk_states(run: RunDirectory) -> list[str]:
    return [event.data["state"] for event in of_kind(run, "disk")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return trained(config_of(tmp_path_factory.mktemp("undisturbed")))


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    with small_file_system(tmp_path / "disk", megabytes=6) as folder:
        yield folder


@pytest.mark.parametrize("leave", [pytest.param(256 * 1024, marks=pytest.mark.ci_slow), 0])
def test_a_disk_that_fills_up_and_is_freed_again(
    tmp_path: Path, small_disk: Path, undisturbed: RunDirectory, leave: int
) -> None:
    run = new_run(config_of(tmp_path, root=small_disk))
    reached, freed = tmp_path / "reached", tmp_path / "freed"

    def until_it_is_freed() -> None:
        reached.touch()
        wait_for(freed.exists, what="the test to see what it waits for")

    with prompt_disk(), pytest.MonkeyPatch.context() as patch:
        at_steps(patch, s12=lambda: fill(small_disk, leave=leave), s35=until_it_is_freed)
        pids = start_run(run, 2)
        wait_for(reached.exists, what="step 35")
        if leave:  # else no status can be replaced
            wait_for(
                lambda: (s := run.read_status()) is not None and s.disk != "ok",
                what="failing durability",
            )
            status = run.read_status()
            assert status is not None and status.disk.startswith("failing: checkpoint: ")
            assert os.strerror(errno.ENOSPC) in status.disk
        (small_disk / "ballast").unlink()
        freed.touch()
        assert wait_ranks(pids) == [0, 0]
    assert outcome(run) == "finished"
    failed = [event.data for event in of_kind(run, "checkpoint") if event.data["state"] == "failed"]
    # A rank that cannot write its share may have no room to say why.
    known = (os.strerror(errno.ENOSPC), "rank 1: ")
    assert (
        failed and [data["reason"] for data in failed if not data["reason"].startswith(known)] == []
    )
    assert any(os.strerror(errno.ENOSPC) in data["reason"] for data in failed)
    assert disk_states(run)[0] == "failing" and disk_states(run)[-1] == "ok"
    assert (run.read_status() or pytest.fail("no status")).disk == "ok"
    assert not list(run.checkpoints.glob(".*")), "temporary folders are left"
    assert_whole(run)
    assert_same(run, undisturbed)


@pytest.mark.fault("R8")
def test_a_rank_that_finds_a_full_disk_says_so_in_one_sentence(
    tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tiny(tmp_path, run={"root": str(small_disk)}))
    fill(small_disk, leave=0)
    pids = start_ranks(
        rank_main, 1, folder=tmp_path / "results", init=False, env={"GUARDRAIL_RUN": str(run.path)}
    )
    assert wait_ranks(pids) == [ExitCode.WORKERS_FAILED]
    # tokenizers warns in a forked process that its parent used it.
    lines = capfd.readouterr().err.splitlines(keepends=True)
    errors = "".join(line for line in lines if "okenizers" not in line and "TOKENIZERS" not in line)
    assert str(DiskRefuses(run.path, os.strerror(errno.ENOSPC))) in errors
    assert "Traceback" not in errors and errors.count("\n") == 1


class Refused:
    """A staged disk error that can be turned off."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.on = False

    def wrapped(
        self, whole: Callable[..., Any], applies: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def refusing(*arguments: Any, **settings: Any) -> Any:
            if self.on and applies(*arguments):
                raise self.error
            return whole(*arguments, **settings)

        return refusing

    def turn(self, *, on: bool) -> Callable[[], None]:
        return lambda: setattr(self, "on", on)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name", "error", "said"),
    [
        (guardrail.torch.checkpoint.rank_share, "write_file", FULL, "checkpoint: No space left"),
        (
            guardrail.torch.checkpoint.rank_share,
            "write_file",
            RuntimeError("enforce fail at inline_container.cc"),
            "enforce fail",
        ),
        (
            guardrail.torch.checkpoint.commit,
            "commit",
            OSError(errno.EIO, "Input/output error"),
            "Input/output error",
        ),
        (RunDirectory, "write_event", FULL, "journal: No space left"),
        (MetricsWriter, "append", FULL, "metrics: No space left"),
    ],
)
def test_a_file_system_that_refuses_for_a_while(
    tmp_path: Path,
    undisturbed: RunDirectory,
    module: Any,
    name: str,
    error: BaseException,
    said: str,
) -> None:
    refused = Refused(error)
    run = new_run(config_of(tmp_path))
    with prompt_disk(), pytest.MonkeyPatch.context() as patch:
        where = guardrail.torch.checkpoint.disk_checkpoints if name == "commit" else module
        patch.setattr(where, name, refused.wrapped(getattr(module, name)))
        at_steps(patch, s12=refused.turn(on=True), s35=refused.turn(on=False))
        assert train(run, 2) == "finished"
    failing = [event.message for event in of_kind(run, "disk") if event.data["state"] == "failing"]
    assert any(said in message for message in failing)
    assert disk_states(run)[-1] == "ok"
    assert [event.kind for event in run.events() if event.kind in ("rollback", "restarted")] == [
        "rollback"
    ]
    assert_whole(run)
    assert_same(run, undisturbed)


@pytest.mark.fault("R3")
def test_a_run_whose_end_could_not_be_saved_has_failed_and_can_be_resumed(
    tmp_path: Path, undisturbed: RunDirectory
) -> None:
    """A disk that stays full does not keep a run from its end, and what it kept from being saved is
    not called done.
    """
    refused = Refused(FULL)
    run = new_run(config_of(tmp_path))
    supervisor = SupervisorJournal(run, LaunchSection(), socket.gethostname(), Mode.AUTO)
    with prompt_disk(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            guardrail.torch.checkpoint.rank_share,
            "write_file",
            refused.wrapped(guardrail.torch.checkpoint.rank_share.write_file),
        )
        at_steps(patch, s35=refused.turn(on=True))
        assert train(run, 2) == "failed"
    (ended,) = of_kind(run, "ended")
    assert not ended.data["saved"] and ended.data["planned"] == "finished"
    assert os.strerror(errno.ENOSPC) in ended.message
    status = run.read_status()
    assert status is not None and status.phase is Phase.FAILED
    assert supervisor.read_outcome_of_ranks([]) == (Phase.FAILED, ExitCode.WORKERS_FAILED)
    assert read_manifest(checkpoint_dirs(run.checkpoints)[0]).step == 30
    assert prepare_resume(str(run.path), (), root="") is not None
    assert train(run, 2) == "finished"
    assert_same(run, undisturbed)


@pytest.mark.fault("R3")
def test_a_run_that_an_older_version_called_finished_without_its_last_steps_is_resumed(
    tmp_path: Path,
) -> None:
    run = new_run(config_of(tmp_path))
    run.write_status(Status(run=run.name, phase=Phase.FINISHED, step=50))
    for saved, resumed in ((True, False), (False, True)):
        run.append("ended", "all steps are done", phase="finished", saved=saved)
        assert (prepare_resume(str(run.path), (), root="") is not None) is resumed


@pytest.mark.fault("R7")
def test_a_rank_whose_disk_refuses_everything_does_not_make_the_others_wait(tmp_path: Path) -> None:
    """Rank 1 can write neither its share nor that it could not: the others learn it with the
    numbers of a step.
    """
    run = new_run(tiny(tmp_path, world=2, train={"steps": 8}, checkpoint={"every": 4, "keep": 2}))

    def refused(job: Any) -> Any:
        if job.rank == 1 and job.snapshot.step:
            raise FULL
        return write_share(job)

    write_share, withdraw = (
        guardrail.torch.checkpoint.disk_checkpoints.write_share,
        guardrail.torch.checkpoint.disk_checkpoints.report_failure,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guardrail.torch.checkpoint.disk_checkpoints, "write_share", refused)
        patch.setattr(
            guardrail.torch.checkpoint.disk_checkpoints,
            "report_failure",
            lambda job, why: None if job.rank else withdraw(job, why),
        )
        assert train(run, 2) == "failed"  # not after launch.save_timeout, which are 1800
    (ended,) = of_kind(run, "ended")
    no_space = os.strerror(errno.ENOSPC)
    assert f"rank 1: {no_space}" in ended.message
    failed = [
        event.data["reason"]
        for event in of_kind(run, "checkpoint")
        if event.data["state"] == "failed"
    ]
    # They do not know why: its reason is not on the disk either.
    assert failed and all(why.startswith("rank 1: ") and no_space not in why for why in failed)


# -- checkpoints that do not hold


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "rank-00000.safetensors", 1000)


def empty(checkpoint: Path) -> None:
    os.truncate(checkpoint / "rank-00000.safetensors", 0)


def lose_a_shard(checkpoint: Path) -> None:
    (checkpoint / "rank-00001.safetensors").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def write_an_old_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text('{"version": 0, "step": 30}')


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = new_run(config_of(tmp_path_factory.mktemp("stopped")))
    run.send(Command(id="stop", kind="stop", at_step=34))
    with prompt_disk():
        assert train(run, 2) == "stopped"
    return run


def copied(run: RunDirectory, folder: Path) -> RunDirectory:
    shutil.copytree(run.path, folder / "runs" / "copy")
    return RunDirectory.open(folder / "runs" / "copy")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip_a_bit, "SHA-256"),
        (truncate, " 1000 bytes"),
        (empty, " 0 bytes"),
        (lose_a_shard, "rank-00001.safetensors is missing"),
        (lose_the_manifest, "manifest.json is missing"),
        (write_an_old_manifest, " format"),
    ],
)
def test_a_resume_passes_over_a_damaged_checkpoint_and_says_why(
    tmp_path: Path,
    undisturbed: RunDirectory,
    stopped: RunDirectory,
    damage: Callable[[Path], None],
    why: str,
) -> None:
    run = copied(stopped, tmp_path)
    newest, before = checkpoint_dirs(run.checkpoints)[:2]
    assert read_manifest(newest).step == 34 and read_manifest(before).step == 30
    damage(newest)
    assert train(run, 2) == "finished"
    assert [(e.step, e.data["checkpoint"]) for e in of_kind(run, "restarted")] == [
        (30, before.name)
    ]
    invalid = [event for event in of_kind(run, "checkpoint") if event.data["state"] == "invalid"]
    assert {event.data["path"] for event in invalid} == {newest.name}
    assert all(why in event.data["reason"] for event in invalid)
    assert_same(run, undisturbed)


def test_with_no_valid_checkpoint_a_run_begins_again(
    tmp_path: Path, undisturbed: RunDirectory, stopped: RunDirectory
) -> None:
    run = copied(stopped, tmp_path)
    for path in checkpoint_dirs(run.checkpoints):
        flip_a_bit(path)
    assert train(run, 2) == "finished"
    (restarted,) = of_kind(run, "restarted")
    assert (restarted.step, restarted.data["checkpoint"]) == (0, "")
    assert_same(run, undisturbed)


def test_the_supervisors_log_says_later_what_a_full_disk_did_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Python's own output is buffered or not: unbuffered, `print` drops what a write has
    not taken.
    """
    file, logged = tmp_path / "supervisor.log", ["failure 1: rank 1 was killed", "start 1"]
    write, room = os.write, [0]

    def with_room(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: room[0]])

    with file.open("wb", buffering=0) as opened:
        monkeypatch.setattr(chronicle, "STDOUT", opened.fileno())
        monkeypatch.setattr(os, "write", with_room)
        for message in logged:
            chronicle.log(message)
        assert not file.read_bytes()
        room[0] = 7  # a write takes a part
        chronicle.flush_log()
    lines = file.read_text().splitlines()
    assert [line[20:] for line in lines] == logged


def test_two_threads_of_the_supervisor_log_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notifier ended with an IndexError when the supervisor wrote the log at the same
    moment.
    """
    file = tmp_path / "supervisor.log"
    write, failures = os.write, []

    def write_slowly(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        time.sleep(0.001)  # lets the other thread run between the write and what follows it
        return written

    def work(name: str) -> None:
        try:
            for number in range(50):
                chronicle.log(f"{name} {number}")
        except Exception as error:
            failures.append(error)

    with file.open("wb", buffering=0) as opened:
        monkeypatch.setattr(chronicle, "STDOUT", opened.fileno())
        monkeypatch.setattr(os, "write", write_slowly)
        threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    lines = [line[20:] for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(
        f"{name} {number}" for name in ("one", "two") for number in range(50)
    )
