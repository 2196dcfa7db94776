"""One rank that needs no torch and no model: it counts steps, saves the count, and misbehaves where
it is told to.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from guardrail.core.config import load_trainer_config
from guardrail.core.files import replace_file
from guardrail.core.records.status import Phase, Status
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import StopSignals


def here_it_hangs() -> None:
    while True:
        time.sleep(0.1)


def misbehave(kind: str, run: RunDirectory) -> None:
    if kind == "exit":
        print("this is the line that explains it", flush=True)
        os._exit(1)
    if kind == "record":  # as torch's `record` does for an exception
        message = {"message": {"message": "ValueError: too small", "extraInfo": {}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(message))
        os._exit(1)
    if kind == "full":
        with (
            contextlib.suppress(OSError),
            (run.path.parent / "ballast").open("wb", buffering=0) as file,
        ):
            while file.write(bytes(4096)):
                pass
        os._exit(4)
    if kind == "hang":
        here_it_hangs()
    if kind == "lock":
        while not (run.path / "journal.jsonl").exists():  # rank 0 makes it, and may be slower
            time.sleep(0.02)
        fcntl.flock(os.open(run.path / "journal.jsonl", os.O_RDWR), fcntl.LOCK_EX)
    if kind in ("freeze", "lock"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "silent":
        os._exit(0)
    if kind == "forks" and os.fork() == 0:
        os.setsid()
        here_it_hangs()
    if kind == "chatty":
        for _ in range(1000):
            run.append("note", "a long line that nobody reads " * 30)


def strike(run: RunDirectory, times: int) -> bool:
    """True for the first so many starts of the rank, however many agents and supervisors they are
    spread over.
    """
    marks = (run.checkpoints / f"struck-{number}" for number in range(times))
    for mark in marks:
        with contextlib.suppress(FileExistsError):
            mark.touch(exist_ok=False)
            return True
    return False


def meet(gloo: bool) -> Callable[[], object]:
    """What each step ends with: nothing, or an all-reduce that waits for the other ranks."""
    if not gloo:
        return lambda: None
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    number = torch.ones(1)
    return lambda: dist.all_reduce(number)


def is_ahead(run: RunDirectory, step: int) -> bool:
    """Whether another rank has not got within ten steps of `step`."""
    files = (run.checkpoints / f"fake-{rank}" for rank in range(int(os.environ["WORLD_SIZE"])))
    return step > 10 and any(
        not file.exists() or int(file.read_text()) < step - 10 for file in files
    )


def main() -> None:
    run = RunDirectory.open(os.environ["GUARDRAIL_RUN"])
    rank = int(os.environ["RANK"])
    start = int(os.environ["GUARDRAIL_INCARNATION"]) + int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    config = load_trainer_config(run.path / "config.toml")
    fake = config.fake  # type: ignore[attr-defined]
    time.sleep(fake.import_seconds)
    signals = StopSignals()
    signals.install(run.logs / f"rank-{rank}.stacks")
    heartbeat = Heartbeat(
        run, rank, status=lambda: Status(run=run.name, phase=Phase.SETUP, total_steps=fake.steps)
    )
    heartbeat.status = lambda: Status(
        run=run.name, phase=heartbeat.phase, step=heartbeat.step, total_steps=fake.steps
    )
    heartbeat.start()
    print(
        f"rank {rank} start {start} threads {os.environ['OMP_NUM_THREADS']} in {os.getcwd()}",
        flush=True,
    )
    together = meet(fake.gloo)
    saved = run.checkpoints / f"fake-{rank}"
    first = int(saved.read_text()) if saved.exists() else 0
    if rank == 0:
        run.append("restarted" if first else "started", f"begins after step {first}", step=first)
    strikes = rank == fake.rank and strike(run, fake.starts)
    if strikes and fake.fault == "usage":
        end(run, rank, heartbeat, Phase.FAILED, 2)
    for step in range(first + 1, fake.steps + 1):
        heartbeat.at(Phase.STEP, step)
        if strikes and step == fake.step:
            misbehave(fake.fault, run)
        time.sleep(fake.seconds)
        together()
        while fake.lockstep and is_ahead(run, step) and not signals.requested:
            time.sleep(0.02)
        replace_file(saved, str(step).encode(), sync=False)
        if signals.requested and fake.fault != "deaf":
            end(run, rank, heartbeat, Phase.STOPPED, 130)
    end(run, rank, heartbeat, Phase.FINISHED, 0)


def end(run: RunDirectory, rank: int, heartbeat: Heartbeat, phase: Phase, code: int) -> None:
    heartbeat.at(phase)
    heartbeat.stop()
    if rank == 0:
        run.append(
            "ended",
            f"{phase.value} by the fake",
            step=heartbeat.step,
            phase=phase.value,
            exit_code=code,
        )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    assert Path.cwd() == Path("/")
    sys.exit(main())
