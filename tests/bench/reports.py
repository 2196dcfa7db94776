"""File operations per second in the run directory, while 1,024 ranks on 128 nodes train.

    python -m tests.bench.reports [--nodes 128] [--ranks 8] [--seconds 10]

One node runs: its supervisor polls its ranks as often as a real one, and its ranks write
heartbeats. The files of the other nodes exist and do not change. An audit hook counts everything
that opens, lists, renames or removes something below the run directory. On a shared file system
each of these is a request to a server. It works with older revisions of `guardrail/` too:
PYTHONPATH=OTHER python -m tests.bench.reports.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guardrail.core.records.status import Phase, RankStatus
from guardrail.rundir import local_ranks
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.local_ranks import LocalRanks
from guardrail.rundir.run_directory import RunDirectory

LOOK_SECONDS = 0.4  # guardrail.launch.supervisor.POLL_SECONDS
EVENTS = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.utime")


class Operations:
    """Counts the file operations of this process below a folder."""

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._prefix = os.fsencode(folder)
        self._counting = True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._counting and event in EVENTS and isinstance(arguments[0], (str, bytes)):
            if os.fsencode(arguments[0]).startswith(self._prefix):
                self.counts[event] += 1

    def stop(self) -> int:
        self._counting = False
        return self.counts.total()


def elsewhere(run: RunDirectory, nodes: int, ranks: int) -> None:
    """Write the files of the other nodes."""
    for node in range(1, nodes):
        reports = tuple(
            RankStatus(
                rank=node * ranks + one,
                pid=one + 1,
                host=f"node-{node}",
                phase=Phase.STEP,
                heartbeat=1.0,
            )
            for one in range(ranks)
        )
        if hasattr(run, "write_node"):
            from guardrail.core.records.status import NodeStatus

            run.write_node(NodeStatus(node=str(node), host=f"node-{node}", ranks=reports))
        else:
            for report in reports:
                run.write_rank(report)


def rank_operations(folder: Path, rank: int, seconds: float) -> int:
    """Count the operations of one rank's heartbeat."""
    run = RunDirectory.open(folder)
    operations = Operations(folder)
    heart = Heartbeat(run, rank).start()
    heart.at(Phase.STEP, 1)
    time.sleep(seconds)
    count = operations.stop()
    os.write(1, f"{count}\n".encode())
    os._exit(0)


def supervisor_operations(
    run: RunDirectory, nodes: int, play: Callable[[dict[str, str]], None], seconds: float
) -> int:
    """Count the operations of one supervisor, while `play` runs its ranks."""
    if hasattr(LocalRanks, "begin"):
        ranks, variables = LocalRanks(run, nodes=nodes), {}
        variables = ranks.begin()
    else:
        ranks, variables = LocalRanks(run, socket.gethostname()), {}  # type: ignore[call-arg, arg-type]
    thread = threading.Thread(target=play, args=(variables,))
    thread.start()
    operations = Operations(run.path)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ranks.look(os.getpid())
        with contextlib.suppress(AttributeError):
            ranks.publish()
        time.sleep(LOOK_SECONDS)
    count = operations.stop()
    thread.join()
    with contextlib.suppress(AttributeError):
        ranks.end()
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=8, help="on each node")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank >= 0:
        return rank_operations(Path(options.run), options.rank, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(folder, "bench", "")
        elsewhere(run, options.nodes, options.ranks)
        counted: list[int] = []

        def play(variables: dict[str, str]) -> None:
            world = {
                "WORLD_SIZE": str(options.nodes * options.ranks),
                "LOCAL_WORLD_SIZE": str(options.ranks),
            }
            environment = {**os.environ, **world, "GUARDRAIL_RUN": str(run.path), **variables}
            command = [
                sys.executable,
                "-m",
                "tests.bench.reports",
                f"--seconds={options.seconds}",
                f"--run={run.path}",
            ]
            children = [
                subprocess.Popen(
                    [*command, f"--rank={rank}"], env=environment, stdout=subprocess.PIPE
                )
                # rank 0 of the run writes status.json as well, on one node
                for rank in range(1, options.ranks + 1)
            ]
            counted.extend(int(child.communicate()[0]) for child in children)

        of_supervisor = (
            supervisor_operations(run, options.nodes, play, options.seconds) / options.seconds
        )
        of_ranks = sum(counted) / options.seconds
        print(
            f"guardrail in {Path(local_ranks.__file__).parent}; {options.nodes} nodes, {options.ranks} ranks each"
        )
        print("| file operations a second | one node | all nodes |")
        print("|---|---|---|")
        for name, rate in (("supervisor", of_supervisor), ("its ranks", of_ranks)):
            print(f"| {name} | {rate:,.1f} | {rate * options.nodes:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
