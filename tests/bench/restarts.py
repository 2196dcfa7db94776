"""Whether a run recovers from each kind of failure, and how long it takes: `make restarts`.

    python -m tests.bench.restarts [--runs 20] [--kinds kill-0,kill-1,...]

Each run is a real `guardrail launch` of two ranks with the default settings of [launch]. One rank
gets a fault. The run must train again within 60 seconds and count one failure. A line per run goes
to stderr, the table to stdout.

    kill-0, kill-1  SIGKILL to a rank in training
    stop            SIGSTOP to a rank in training (rank 1 and rank 0 in turn)
    set-up          SIGKILL to a rank that is still in set-up
    save            SIGKILL to a rank during a checkpoint, before its rename
    end             the same during the last checkpoint of the run
    memory          MemoryError in a rank (the kernel itself would send SIGKILL)
    disk            SIGKILL to a rank while the disk is full; there is room again five seconds later
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from guardrail.core.records.status import Phase, Status
from guardrail.rundir.run_directory import RunDirectory
from tests.support.lab import FAKES, Lab

KINDS = ("kill-0", "kill-1", "stop", "set-up", "save", "end", "memory", "disk")
LIMIT_SECONDS = 60.0
START_SECONDS = 300.0  # for a run to begin, on a machine that is busy with other things
SIZE = "32m"  # of the disk that is filled
FULL_SECONDS = 5.0
CONFIG = """
[run]
name = "restarts"
root = "{root}"
[launch]
processes = 2
device = "cpu"
threads = 1
[data]
sources = ["{corpus}"]
cache = "{cache}"
sequence_length = 32
eval_fraction = 0.0
[model]
layers = 2
width = 32
heads = 2
[optim]
warmup_steps = 5
[train]
steps = {steps}
batch_size = 8
[guard]
mode = "advise"
[checkpoint]
every = 20
[tensorboard]
enabled = false
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run. `seconds`: from the fault until it trains again; NaN: it does not."""

    kind: str
    seconds: float
    failures: int
    wrong: str = ""
    log: str = ""  # of the supervisor

    @property
    def recovered(self) -> bool:
        return not self.wrong and self.seconds <= LIMIT_SECONDS


class Stage:
    """A folder with a corpus, in which runs are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        for number in range(40):
            (self.corpus / f"{number:02d}.txt").write_text(
                text[number * 1000 : number * 1000 + 4000]
            )

    def run(self, kind: str, number: int) -> Outcome:
        """Run once with one fault."""
        folder = self.folder / f"{kind}-{number}"
        folder.mkdir()
        with (
            small_disk(folder / "disk")
            if kind == "disk"
            else contextlib.nullcontext(folder / "disk") as disk
        ):
            lab = InjectedLab(folder)
            try:
                return self._run(lab, disk, kind, number)
            except (TimeoutError, AssertionError) as error:
                return Outcome(kind=kind, seconds=float("nan"), failures=-1, wrong=str(error))
            finally:
                lab.close()

    def _run(self, lab: InjectedLab, disk: Path, kind: str, number: int) -> Outcome:
        rank = (
            number % 2
            if kind in ("stop", "set-up", "save", "end", "disk", "memory")
            else int(kind[-1])
        )
        steps = 60 if kind == "end" else 100_000
        (lab.folder / "c.toml").write_text(
            CONFIG.format(root=disk, corpus=self.corpus, cache=self.folder / "cache", steps=steps)
        )
        lab.root = disk
        lab.variables = injection(kind, rank, lab.folder / "struck", steps)
        launched = lab.guardrail("launch", "c.toml", "--detach", timeout=START_SECONDS)
        assert launched.returncode == 0, launched.stderr
        run = lab.newest()
        struck = strike(lab, run, kind, rank, disk)
        trained = wait(lambda: trains_again(run), LIMIT_SECONDS * 2)
        seconds = time.time() - struck
        failures = count_failures(run)
        wrong = "" if trained else f"did not train again; {last_line(run)}"
        if not wrong and failures != 1:
            wrong = f"{failures} failures counted"
        return Outcome(
            kind=kind,
            seconds=seconds if trained else float("nan"),
            failures=failures,
            wrong=wrong,
            log=(run.logs / "supervisor.log").read_text(encoding="utf-8", errors="replace"),
        )


class InjectedLab(Lab):
    """A lab whose ranks import tests/fakes/injected/sitecustomize.py."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.variables: dict[str, str] = {}

    def environment(self, **variables: str) -> dict[str, str]:
        made = super().environment(**self.variables, **variables)
        made["PYTHONPATH"] = os.pathsep.join([str(FAKES / "injected"), made["PYTHONPATH"]])
        return made


def injection(kind: str, rank: int, mark: Path, steps: int) -> dict[str, str]:
    """What tests/fakes/injected/sitecustomize.py is to do."""
    fault = {"save": "save", "end": "save", "memory": "memory"}.get(kind, "")
    step = f"step-{40 if kind == 'save' else steps:08d}"
    # Rank 0 commits a checkpoint; the other one says that its share is written.
    name = step if rank == 0 else f"{step}{os.sep}rank-{rank:05d}.json"
    return {
        "RESTARTS_FAULT": fault,
        "RESTARTS_RANK": str(rank),
        "RESTARTS_NAME": name,
        "RESTARTS_MARK": str(mark),
    }


def strike(lab: InjectedLab, run: RunDirectory, kind: str, rank: int, disk: Path) -> float:
    """Cause the fault; return its time (time.time())."""
    mark = Path(lab.variables["RESTARTS_MARK"])
    # it strikes by itself, and the run may have trained for a moment only
    if kind in ("save", "end"):
        return time_of(mark)
    if kind == "set-up":
        assert wait(lambda: pid_of(run, rank, (Phase.STARTING, Phase.SETUP)), START_SECONDS), (
            "no rank in set-up"
        )
        os.kill(pid_of(run, rank), signal.SIGKILL)
        return time.time()
    assert wait(
        lambda: status_of(run).phase is Phase.STEP and status_of(run).step >= 5, START_SECONDS
    ), "no training"
    if kind == "memory":
        Path(f"{mark}.strike").touch()
        return time_of(mark)
    if kind == "disk":
        fill(disk / "filler")
    os.kill(pid_of(run, rank), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    if kind == "disk":
        time.sleep(FULL_SECONDS)
        (disk / "filler").unlink()
    return time.time()


def time_of(mark: Path) -> float:
    """When the fault struck, as its mark says."""
    assert wait(mark.exists, START_SECONDS), "the fault did not happen"
    return mark.stat().st_mtime


def trains_again(run: RunDirectory) -> bool:
    """Whether ranks of another start than the first train, or have ended the run as it should
    end.
    """
    status = run.read_status()
    if status is None or status.restarts == 0:
        return False
    return status.phase is Phase.FINISHED or (status.phase is Phase.STEP and status.step > 1)


def status_of(run: RunDirectory) -> Status:
    return run.read_status() or Status(run="", phase=Phase.STARTING)


def pid_of(run: RunDirectory, rank: int, phases: Sequence[Phase] = tuple(Phase)) -> int:
    """Return the pid of a rank; 0 if it has not reported."""
    return next(
        (one.pid for one in run.read_ranks() if one.rank == rank and one.phase in phases), 0
    )


def count_failures(run: RunDirectory) -> int:
    """As the supervisor has counted them."""
    text = (run.logs / "supervisor.log").read_text(encoding="utf-8", errors="replace")
    return max(
        (int(found) for found in re.findall(r" failure (\d+), launch\.max_restarts", text)),
        default=0,
    )


def last_line(run: RunDirectory) -> str:
    return (
        (run.logs / "supervisor.log")
        .read_text(encoding="utf-8", errors="replace")
        .strip()
        .splitlines()[-1]
    )


def wait(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own that can be filled. Raises AssertionError where this user may not
    mount one.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert mounted.returncode == 0, f"cannot mount a small disk: {mounted.stderr.strip()}"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(file: Path) -> None:
    """Fill a disk completely."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while opened.write(b"\0" * 65536):
            pass
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as opened:
        while opened.write(b"\0"):
            pass


def may_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| kind | recovered within 60 s | failures counted | median s | worst s |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of_kind:
            continue
        seconds = sorted(
            outcome.seconds for outcome in of_kind if outcome.seconds == outcome.seconds
        )
        failures = Counter(outcome.failures for outcome in of_kind)
        counted = ", ".join(f"{number} ({runs} runs)" for number, runs in sorted(failures.items()))
        median, worst = "-", "-"
        if seconds:
            median = f"{statistics.median(seconds):.1f}"
        if len(seconds) == len(of_kind):
            worst = f"{seconds[-1]:.1f}"
        recovered = f"{sum(outcome.recovered for outcome in of_kind)} of {len(of_kind)}"
        lines.append(f"| {kind} | {recovered} | {counted} | {median} | {worst} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    options = parser.parse_args(arguments)
    kinds, outcomes = options.kinds.split(","), []
    folder = Path(tempfile.mkdtemp(prefix="guardrail-restarts-"))
    try:
        stage = Stage(folder)
        for number in range(options.runs):
            for kind in kinds:
                if kind == "disk" and not may_mount():
                    print(
                        "disk: skipped, because only root may mount a small disk", file=sys.stderr
                    )
                    continue
                outcome = stage.run(kind, number)
                outcomes.append(outcome)
                text = outcome.wrong or f"trains again after {outcome.seconds:.1f} s"
                print(
                    f"{len(outcomes):3d} of {options.runs * len(kinds)}  {kind:7s} {text}",
                    file=sys.stderr,
                    flush=True,
                )
                if not outcome.recovered:
                    print(outcome.log, file=sys.stderr, flush=True)
                if not outcome.wrong:
                    shutil.rmtree(folder / f"{kind}-{number}", ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(outcomes))
    is_good = all(outcome.recovered for outcome in outcomes)
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
