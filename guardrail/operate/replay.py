"""Make steps of a run again, and check that every number is the same.

A replay is a resume in another folder: the configuration of the run, its journal and one of its
checkpoints (or none: from the beginning). The decisions of the journal, from the quarantine to a
learning rate that a user set, are facts there, as after a crash. The guard itself is off, so it
decides nothing again. The directory of the run is only read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from guardrail.core.errors import (
    ExitCode,
    RunDirectoryError,
    UsageError,
    WorkersFailed,
)
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered, Ended
from guardrail.core.files import FOLDER_MODE, encode_json, replace_file
from guardrail.core.records.commands import Command
from guardrail.core.records.record import Record
from guardrail.core.text import clean_text
from guardrail.decide.control_commands.mode import ChangeMode
from guardrail.decide.control_commands.stop import Stop
from guardrail.launch import supervisor_process
from guardrail.operate.replay_comparison import Comparison, Difference, compare_weights
from guardrail.operate.replay_plan import ReplayPlan, machine_remarks, plan_replay
from guardrail.operate.replay_signals import ReplaySignals
from guardrail.rundir import processes
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import subprocess

POLL_SECONDS = 0.3
END_SECONDS = 20  # the supervisor of a replay has this long to end
ReportProgress = Callable[[int, int], None]  # (steps compared, steps in all)


class ReplayOutcome(Record, frozen=True, kw_only=True):
    """What a replay has shown.

    Attributes:
        same: every compared number is the same, bit by bit, and so are the weights where both runs
            saved them.
        from_step, to_step: steps (from_step, to_step] were made.
        steps: compared ones.
        columns: compared ones.
        missing: steps that one of both runs has no row of.
        first: the first difference.
        weights_step: of the checkpoints that were compared; None: no step was saved by both.
        remarks: what differs here from the start of the run, in sentences.
        scratch: the folder of the replay, where it was kept.
    """

    run: str
    incident: int | None
    same: bool
    from_step: int
    to_step: int
    steps: int
    columns: tuple[str, ...]
    missing: int = 0
    first: Difference | None = None
    weights_step: int | None = None
    weights_same: bool = True
    remarks: tuple[str, ...] = ()
    scratch: str = ""

    def sentence(self) -> str:
        """Return the outcome in one line."""
        steps = f"steps {self.from_step + 1:,} to {self.to_step:,}"
        if self.first is not None:
            return f"not the same: {self.first.sentence()}"
        if not self.weights_same:
            return f"not the same: the weights after step {self.weights_step:,} differ"
        if not self.same:
            return f"not the same: {self.missing:,} of {steps} have no row in one of both runs"
        weights = ""
        if self.weights_step is not None:
            weights = f", and so are the weights after step {self.weights_step:,}"
        numbers = self.steps * len(self.columns)
        return f"the same: {steps}, {numbers:,} numbers, bit by bit{weights}"


def replay_run(
    run: RunDirectory, *, incident: int | None = None, keep: bool = False, report: ReportProgress
) -> ReplayOutcome:
    """Plan a replay, run it and compare it.

    Args:
        incident: only the steps around it.
        keep: the folder of the replay is kept.
        report: called with the progress.

    Raises:
        UsageError: it cannot be replayed here.
        WorkersFailed: the ranks failed.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; no process is left.
    """
    plan = plan_replay(run, incident)
    with ReplaySignals() as signals:
        with signals.held():
            scratch = make_scratch_run(run, plan)
        try:
            comparison = Comparison(run, scratch, plan)
            _follow(scratch, comparison, plan, report, signals)
            return make_outcome(run, scratch, plan, comparison, keep=keep)
        finally:
            with signals.held():
                if not keep:
                    shutil.rmtree(scratch.path, ignore_errors=True)


def make_outcome(
    run: RunDirectory,
    scratch: RunDirectory,
    plan: ReplayPlan,
    comparison: Comparison,
    *,
    keep: bool,
) -> ReplayOutcome:
    """Return what is known once the replay has ended."""
    comparison.finish()
    saved, is_equal = None, True
    if comparison.first is None:
        saved, is_equal = compare_weights(run, scratch, plan)
    folder = ""
    if keep:
        folder = str(scratch.path)
    return ReplayOutcome(
        run=run.name,
        incident=plan.incident,
        same=comparison.first is None and not comparison.missing and is_equal,
        from_step=plan.from_step,
        to_step=plan.to_step,
        steps=comparison.steps,
        columns=comparison.columns,
        missing=comparison.missing,
        first=comparison.first,
        weights_step=saved,
        weights_same=is_equal,
        remarks=machine_remarks(run),
        scratch=folder,
    )


# -- the folder of the replay


def make_scratch_run(run: RunDirectory, plan: ReplayPlan) -> RunDirectory:
    """Return a run directory that makes the steps of the plan and then stops.

    It lies in the folder of the run, where links to a checkpoint need no space, if it can.

    Raises:
        RunDirectoryError: it cannot be made.
        UsageError: the configuration does not say how to start the run.
    """
    folder = Path(tempfile.gettempdir())
    if os.access(run.path.parent, os.W_OK):
        folder = run.path.parent
    path = folder / f".replay-{run.path.name}-{os.getpid()}-{secrets.token_hex(3)}"
    scratch = RunDirectory.create_at(path, _config_for_replay(run))
    try:
        # The mode stays off, whichever modes the users of the run set.
        events = [one for one in run.events() if not _is_change_of_mode(one)]
        lines = b"".join(encode_json(event.all_fields()) + b"\n" for event in events)
        replace_file(scratch.journal_path, lines)
        if plan.base is not None:
            _link_files(plan.base, scratch.checkpoints / plan.base.name)
        stop = Command(id="replayed", kind=Stop.name, at_step=plan.to_step, who="replay")
        scratch.send(stop)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from error
    return scratch


def _config_for_replay(run: RunDirectory) -> str:
    """Return the configuration of the run, with the guard, messages and restarts off."""
    import tomli_w

    tree = tomllib.loads(run.config_text())
    if "launch" not in tree:
        raise UsageError(
            f"{run.name} was not started by `guardrail launch`: its config.toml has no [launch], "
            "so a replay cannot start it"
        )
    tree.setdefault("guard", {})["mode"] = "off"
    tree.setdefault("tensorboard", {})["enabled"] = False
    tree["launch"]["max_restarts"] = 0
    tree.pop("notify", None)
    return tomli_w.dumps(tree)


def _is_change_of_mode(event: Event) -> bool:
    return isinstance(event, CommandAnswered) and event.command == ChangeMode.name


def _link_files(source: Path, target: Path) -> None:
    """Link the files of a checkpoint, so that pruning the copy leaves the run's own in place."""
    target.mkdir(mode=FOLDER_MODE)
    for file in sorted(source.iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, target / file.name)


# -- its processes


def _follow(
    scratch: RunDirectory,
    comparison: Comparison,
    plan: ReplayPlan,
    report: ReportProgress,
    signals: ReplaySignals,
) -> None:
    """Compare until the replay has ended, or until the first difference."""
    with _started_supervisor(scratch, signals) as supervisor:
        while (code := supervisor_process.find_exit_code(supervisor)) is None:
            comparison.compare_new_rows()
            report(comparison.steps, plan.to_step - plan.from_step)
            if comparison.first is not None:
                return
            time.sleep(POLL_SECONDS)
    if code in (ExitCode.FINISHED, ExitCode.INTERRUPTED):
        return
    reason = f"exit code {code}"
    for event in scratch.events():
        if isinstance(event, Ended):
            reason = clean_text(event.message, 600)
    error_class: type[UsageError | WorkersFailed] = WorkersFailed
    if code == ExitCode.USAGE:
        error_class = UsageError
    raise error_class(f"the replay ended too early: {reason}")


@contextlib.contextmanager
def _started_supervisor(
    scratch: RunDirectory, signals: ReplaySignals
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the replay, and end all its processes, however the block is left."""
    supervisor = None
    try:
        with signals.held():
            supervisor = supervisor_process.start_supervisor(scratch)
        yield supervisor
    finally:
        with signals.held():
            if supervisor is not None:
                _end_supervisor(supervisor)
            processes.kill(processes.processes_of(scratch.path))


def _end_supervisor(supervisor: subprocess.Popen[bytes]) -> None:
    if supervisor.poll() is not None:
        return
    supervisor.send_signal(signal.SIGQUIT)
    with contextlib.suppress(Exception):
        supervisor.wait(timeout=END_SECONDS)
    supervisor.kill()
    supervisor.wait()
