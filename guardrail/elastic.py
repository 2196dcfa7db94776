"""How torch elastic is started, and what can be read from what it says. Imports no torch: it is another process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guardrail.config import LaunchSection
from guardrail.processes import INCARNATION_VARIABLE, RUN_VARIABLE, SUPERVISOR_VARIABLE, cores

# A rank's output is appended, so that the log of the incarnation that failed survives the restart; elastic's own
# --redirects would truncate it. `exec` keeps the rank the direct child of the agent, with the pid that the agent knows.
_RANK = 'exec "$@" >>"$GUARDRAIL_RUN/logs/rank-$RANK.log" 2>&1 </dev/null'

# Ignored signals stay ignored over exec, in the ranks too until they install handlers. So a batch system's SIGTERM to
# every process of the job does not kill a rank that is still importing torch; the supervisor has got the same signal,
# and asks the rank to stop as soon as it can hear.
_AGENT = 'trap "" HUP INT TERM USR1 USR2; exec "$@"'

# torch.distributed.elastic.multiprocessing.api, SubprocessContext._poll: the first failure of a group of workers.
_FAILURE = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker that ended badly, as elastic's log tells it. `exit` is negative for a signal, as in subprocess."""

    exit: int
    local_rank: int
    pid: int

    def __str__(self) -> str:
        if self.exit < 0:
            try:
                return f"was killed by {signal.Signals(-self.exit).name}"
            except ValueError:
                return f"was killed by signal {-self.exit}"
        return f"exited with {self.exit}"


def command(launch: LaunchSection, *, name: str, restarts: int) -> list[str]:
    """The elastic agent's command line.

    Args:
        name: of the run, the same on all its nodes: they find each other by it.
        restarts: what is left of the budget.
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
        # What --standalone does, without a host name that would have to be resolved.
        arguments += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=1"]
        arguments += ["--local-addr=127.0.0.1"]
    else:
        arguments += [f"--rdzv-backend={launch.rendezvous_backend}", f"--rdzv-endpoint={launch.rendezvous_endpoint}"]
        arguments += [f"--node-rank={launch.node_rank}"]
        # Told and not guessed from names: two agents may stand on one host, and the first node's alone is met.
        arguments += [f"--rdzv-conf=is_host={int(not launch.node_rank)},join_timeout={launch.node_seconds:.0f}"]
    arguments += ["--no-python", "/bin/sh", "-c", _RANK, "rank", sys.executable, "-u", "-m", launch.trainer]
    return arguments


def environment(launch: LaunchSection, run: Path, *, incarnation: int) -> dict[str, str]:
    """The agent's environment, which the ranks inherit.

    The agent must not act on signals that a batch system sends to every process of a job: it would give the ranks
    30 seconds and then kill them, or start them again. The supervisor alone decides. SIGQUIT stays, because the list
    cannot be empty. (PET_ variables are torchrun's own way to set an option; older versions ignore this one.)
    """
    variables = dict(os.environ)
    variables[RUN_VARIABLE] = str(run)
    variables[SUPERVISOR_VARIABLE] = str(os.getpid())
    variables[INCARNATION_VARIABLE] = str(incarnation)
    variables["PET_SIGNALS_TO_HANDLE"] = variables["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if launch.nodes > 1:
        # Else an agent that lives on keeps the ranks' meeting place of the first round to itself, and a node that comes
        # back waits for it to be told until both give up (torch 2.13, DynamicRendezvousHandler.next_rendezvous).
        variables.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    variables.setdefault("OMP_NUM_THREADS", str(launch.threads or max(1, cores() // launch.processes)))
    if launch.threads:
        variables["OMP_NUM_THREADS"] = str(launch.threads)
    return variables


class Agent:
    """The running `torch.distributed.run`, and a reader of its log."""

    def __init__(self, launch: LaunchSection, run: Path, log: Path, *, incarnation: int, restarts: int) -> None:
        self._log = log.open("ab")
        self._offset = self._log.tell()
        self.process = subprocess.Popen(
            command(launch, name=f"{run.parent.name}-{run.name}", restarts=restarts),
            env=environment(launch, run, incarnation=incarnation),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def failures(self) -> Iterator[Failure]:
        """Failures that the agent has logged since the last call."""
        try:
            with open(self._log.name, "rb") as log:
                log.seek(self._offset)
                text = log.read()
        except OSError:
            return  # a file system that does not answer; the lines stay where they are
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for found in _FAILURE.finditer(whole):
            code, local_rank, pid = map(int, found.groups())
            yield Failure(exit=code, local_rank=local_rank, pid=pid)

    def end(self) -> None:
        """Kill the agent if it still runs. It leaves its ranks to the reaper."""
        self.process.kill()
        self.process.wait()
        self._log.close()
