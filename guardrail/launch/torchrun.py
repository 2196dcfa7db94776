"""The torch elastic agent: its command line, its environment, and the failures that it prints.

Imports no torch: the agent is another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from guardrail.core.sections import LaunchSection
from guardrail.core.text import clean_text
from guardrail.rundir.processes import (
    INCARNATION_VARIABLE,
    RUN_VARIABLE,
    SUPERVISOR_VARIABLE,
    cores,
)

# A rank's output is appended: the log of a failed start must survive the restart, and elastic's own
# --redirects would truncate it. `exec` keeps the rank the direct child of the agent, with the pid
# that the agent knows; $$ is that pid. torch's `record` writes the exception that ends a rank to
# TORCHELASTIC_ERROR_FILE.
_RANK = (
    'export TORCHELASTIC_ERROR_FILE="$GUARDRAIL_ERRORS-$$.json"; '
    'exec "$@" >>"$GUARDRAIL_RUN/logs/rank-$RANK.log" 2>&1 </dev/null'
)
ERRORS_VARIABLE = "GUARDRAIL_ERRORS"  # path of the error files of a node's ranks, up to the pid
_ERROR_CHARACTERS = 300  # of an exception that the journal holds

# Ignored signals stay ignored over exec, in the ranks too until they install handlers. So a batch
# system's SIGTERM to every process of the job does not kill a rank that is still importing torch.
# The supervisor receives the same signal, and asks the rank to stop once it has handlers.
_AGENT = 'trap "" HUP INT TERM USR1 USR2; exec "$@"'

# torch.distributed.elastic.multiprocessing.api, SubprocessContext._close: within 0.1 s of a failure
# every other rank of this node is asked to end, and has 30 s for it. _poll: after that the first
# failure is logged, with its exit code.
_CLOSING = re.compile(rb"Sending process (\d+) closing signal")
_FAILURE = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank that ended badly, as elastic reports it.

    Attributes:
        exit: its exit status, negative for a signal as in subprocess.
        local_rank: on its node.
        error: the exception that ended it, one line; "" if it wrote none.
    """

    exit: int
    local_rank: int
    pid: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What an agent has printed since the last read.

    Attributes:
        closing: pids of ranks that the agent asks to end because a rank of the same start failed.
        failures: the first rank that failed, once all ranks of its start have ended.
    """

    closing: tuple[int, ...] = ()
    failures: tuple[Failure, ...] = ()


def build_command(launch: LaunchSection, *, name: str, restarts: int) -> list[str]:
    """Return the elastic agent's command line.

    Args:
        name: of the run, the same on all its nodes: they find each other by it.
        restarts: how often this agent may start the ranks again.
    """
    arguments = [
        *("/bin/sh", "-c", _AGENT, "agent"),
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={launch.processes}",
        f"--max-restarts={restarts}",
        f"--rdzv-id={launch.rendezvous_id or name}",
    ]
    if launch.nodes == 1:
        # As --standalone does, without a host name that must be resolved.
        arguments += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=1"]
        arguments += ["--local-addr=127.0.0.1"]
    else:
        arguments += [
            f"--rdzv-backend={launch.rendezvous_backend}",
            f"--rdzv-endpoint={launch.rendezvous_endpoint}",
        ]
        arguments += [f"--node-rank={launch.node_rank}"]
        # is_host is given, not guessed from host names: two agents may run on one host, and the
        # nodes meet at the first node's agent only.
        arguments += [
            f"--rdzv-conf=is_host={int(not launch.node_rank)},join_timeout={launch.node_timeout:.0f}"
        ]
    arguments += [
        "--no-python",
        "/bin/sh",
        "-c",
        # torch fills in its macros with string.Template, where $$ stands for $.
        _RANK.replace("$$", "$$$$"),
        "rank",
        sys.executable,
        "-u",
        "-m",
        launch.trainer,
    ]
    return arguments


def build_environment(
    launch: LaunchSection,
    run: Path,
    *,
    incarnation: int,
    variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the agent's environment, which the ranks inherit.

    The agent must not act on signals that a batch system sends to every process of a job: it would
    give the ranks 30 seconds and then kill them, or start them again. Only the supervisor decides.
    SIGQUIT stays, because the list cannot be empty. PET_ variables set torchrun's options; older
    versions ignore this one.

    Args:
        incarnation: number of earlier starts of the ranks.
        variables: that the ranks need as well.
    """
    environment = {**os.environ, **(variables or {})}
    environment[RUN_VARIABLE] = str(run)
    environment[SUPERVISOR_VARIABLE] = str(os.getpid())
    environment[INCARNATION_VARIABLE] = str(incarnation)
    environment[ERRORS_VARIABLE] = str(_error_files(run, launch))
    environment["PET_SIGNALS_TO_HANDLE"] = environment["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if launch.nodes > 1:
        # An agent keeps one store for all starts of the ranks (torch 2.13,
        # DynamicRendezvousHandler.next_rendezvous), since torch 2.9 without a prefix for each
        # (torch.distributed.rendezvous, _create_c10d_store): the ranks of the second start would
        # find the addresses of the first, and wait for them until launch.collective_timeout is
        # over. A user cannot set this. On one node each start has a new agent, and so a new store.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    threads = max(1, cores() // launch.processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    if launch.threads:
        environment["OMP_NUM_THREADS"] = str(launch.threads)
    return environment


def _error_files(run: Path, launch: LaunchSection) -> Path:
    """Return the path of the error files of this node's ranks, up to "-PID.json"."""
    return run / "logs" / f"error-{launch.node_rank}"


def read_error(file: Path) -> str:
    """Return the exception in an error file of torch elastic, as one line; "" if there is none."""
    try:
        message = json.loads(file.read_bytes())["message"]
        if isinstance(message, dict):
            message = message["message"]
        return clean_text(str(message), _ERROR_CHARACTERS)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Agent:
    """The running `torch.distributed.run`, and a reader of its output.

    It prints into a pipe, so its reports arrive on a full disk too. The log keeps what the disk
    takes.
    """

    def __init__(
        self,
        launch: LaunchSection,
        run: Path,
        log: Path,
        *,
        incarnation: int,
        restarts: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._log: BinaryIO | None = None
        with contextlib.suppress(OSError):
            self._log = log.open("ab", buffering=0)
        self._errors = _error_files(run, launch)
        self._remove_errors()  # pids are used again
        self._pending = b""  # the beginning of a line
        self.process = subprocess.Popen(
            build_command(launch, name=f"{run.parent.name}-{run.name}", restarts=restarts),
            env=build_environment(launch, run, incarnation=incarnation, variables=variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        self._pipe = self.process.stdout
        os.set_blocking(self._pipe.fileno(), False)

    def read_output(self) -> Output:
        """Return what it has printed since the last call. Complete lines only; never waits."""
        text = b"".join(self._read_chunks())
        if not text:
            return Output()
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.write(text)
        text = self._pending + text
        end = text.rfind(b"\n") + 1
        self._pending = text[end:]
        lines = text[:end]
        closing = tuple(int(found.group(1)) for found in _CLOSING.finditer(lines))
        failures = tuple(self._parse_failure(found) for found in _FAILURE.finditer(lines))
        return Output(closing=closing, failures=failures)

    def _parse_failure(self, found: re.Match[bytes]) -> Failure:
        code, local_rank, pid = map(int, found.groups())
        error = read_error(Path(f"{self._errors}-{pid}.json"))
        return Failure(exit=code, local_rank=local_rank, pid=pid, error=error)

    def _remove_errors(self) -> None:
        for file in self._errors.parent.glob(f"{self._errors.name}-*.json"):
            with contextlib.suppress(OSError):
                file.unlink()

    def _read_chunks(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while not self._pipe.closed and (chunk := os.read(self._pipe.fileno(), 64 * 1024)):
                yield chunk

    def end(self) -> None:
        """Kill the agent if it still runs. It leaves its ranks to the reaper."""
        self.process.kill()
        self.process.wait()
        self._remove_errors()  # the log of the rank has the traceback
        self._pipe.close()
        if self._log is not None:
            self._log.close()
