"""Runs a function on several gloo ranks by fork: 0.05 s a start instead of 2 s, since torch is
imported already.

Fork only while the parent holds no threads of torch's own and no CUDA context (OpenMP pools survive
no fork), so the parent never computes with more than one thread.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ports import free_port

torch.set_num_threads(1)

_alive: set[int] = set()


def start_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    init: bool = True,
    folder: Path,
    env: dict[str, str] | None = None,
) -> list[int]:
    """Fork `world` children that call `function(rank, *arguments)`; returns their pids.

    With `init` the child joins a gloo group first; without it only torchrun's environment variables
    are set. The result (or the traceback) of each rank is pickled to `folder/result-RANK`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(world):
        (folder / f"result-{rank}").unlink(missing_ok=True)
        pid = os.fork()
        if pid:
            pids.append(pid)
            _alive.add(pid)
            continue
        code = 1
        try:
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                RANK=str(rank),
                WORLD_SIZE=str(world),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(world),
                OMP_NUM_THREADS="1",
                **(env or {}),
            )
            _forget_accelerate()
            if init:
                dist.init_process_group("gloo")
            outcome = (True, function(rank, *arguments))
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
            outcome = (code == 0, f"exit {code}")
        except BaseException:
            outcome = (False, traceback.format_exc())
        finally:
            try:
                (folder / f"result-{rank}").write_bytes(pickle.dumps(outcome))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return pids


def _forget_accelerate() -> None:
    """An Accelerator that some test made in the parent would tell its forks that they are alone."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def wait_ranks(pids: list[int], *, seconds: float = 120.0) -> list[int]:
    """Exit codes (negative: signal) of all ranks; kills them and raises TimeoutError after
    `seconds`.
    """
    deadline = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (code := ended(pid)) is not None:
                codes[pid] = code
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    _bury(pid)
            raise TimeoutError(
                f"ranks {[pids.index(p) for p in pids if p not in codes]} still ran after {seconds} s"
            )
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def ended(pid: int) -> int | None:
    """Exit code (negative: signal) of a rank, told once; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        return None
    _alive.discard(pid)
    return os.waitstatus_to_exitcode(status)


def bury_ranks() -> None:
    """Kill what a failed test has left running: it would hold the test's folders, locks and
    output.
    """
    for pid in list(_alive):
        _bury(pid)


def _bury(pid: int) -> None:
    _alive.discard(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    folder: Path,
    init: bool = True,
    seconds: float = 120.0,
) -> list[Any]:
    """Results of `function(rank, *arguments)` on every rank; raises AssertionError with a rank's
    traceback.
    """
    wait_ranks(start_ranks(function, world, *arguments, init=init, folder=folder), seconds=seconds)
    results = []
    for rank in range(world):
        file = folder / f"result-{rank}"
        good, value = (
            pickle.loads(file.read_bytes()) if file.exists() else (False, "no result was written")
        )
        assert good, f"rank {rank}:\n{value}"
        results.append(value)
    return results
