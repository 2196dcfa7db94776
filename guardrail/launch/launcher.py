"""What `guardrail launch` does before the first step: checks, run directory, supervisor."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from guardrail.core import secret
from guardrail.core.config import GuardConfig, build_config, is_custom_loop
from guardrail.core.errors import (
    ConfigError,
    RunDirectoryError,
    UsageError,
)
from guardrail.core.events.run_state import Ended
from guardrail.core.format import format_plural
from guardrail.core.overrides import mask_override
from guardrail.core.packages import install_hint, is_installed
from guardrail.core.records.status import Phase, Status
from guardrail.core.text import clean_text
from guardrail.core.toml_file import dump_toml, read_toml
from guardrail.rundir import processes
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import RunLock, holder_of
from guardrail.rundir.run_search import find_run

FIRST_NODE_SECONDS = 30.0  # that a further node waits for the run directory

# Keys that a resumed run may change: how it runs, not what it computes. On another mesh the training
# is the same, with sums in another order and other dropout masks, which depend on the data rank too.
CHANGEABLE = (
    *("launch.", "guard.", "snapshots.", "checkpoint.", "tensorboard.", "notify."),
    *("train.steps", "train.epochs", "train.eval_every", "train.eval_batches"),
    *("parallel.", "train.strategy", "train.micro_batch_size", "train.activation_checkpointing"),
)


class Prepared(NamedTuple):
    """A run directory that is ready for the supervisor of one node.

    Attributes:
        secrets: of [notify], that were written out. The run's copy of the configuration has masks.
        lock: keeps other resumes of this run away until the supervisor has started.
    """

    run: RunDirectory
    node_rank: int
    secrets: dict[str, Any]
    lock: RunLock | None = None


def prepare_run(
    path: str, overrides: tuple[str, ...], run_dir: str | None, *, root: str | None = None
) -> Prepared:
    """Load and check a configuration, check the machine, make the run directory.

    Args:
        run_dir: the run directory to make, or to join on a further node; None: the next one of the
            run's name.
        root: folder of all runs, instead of `run.root`.

    Raises:
        UsageError: a ConfigError, a RunDirectoryError, or a further node without `run_dir`.
    """
    from guardrail.launch import preflight

    settings = load_settings(path, overrides)
    if root is not None:
        absolute = os.path.abspath(os.path.expanduser(root))
        settings = msgspec.structs.replace(
            settings, run=msgspec.structs.replace(settings.run, root=absolute)
        )
    given = {} if root is None else {"run.root": "--root or $GUARDRAIL_ROOT"}
    preflight.check_launch(settings, file=path, overrides=overrides, given=given)
    node_rank, text = settings.launch.node_rank, _dump_shared(settings)
    written_out = _warn_before_launch(settings)
    if run_dir is not None:
        folder = Path(run_dir).absolute()
        run = _await_first_node(folder) if node_rank else RunDirectory.create_at(folder, text)
        return Prepared(run, node_rank, written_out)
    if node_rank:
        raise UsageError("a further node joins the run of the first node: give its --run-dir DIR")
    problem = preflight.find_name_problem(settings, file=path, overrides=overrides)
    if problem is not None:
        raise problem
    run = RunDirectory.create(settings.run.root, settings.run.name, text)
    return Prepared(run, node_rank, written_out)


def _warn_before_launch(settings: GuardConfig) -> dict[str, Any]:
    """Print the warnings about secrets and missing packages to stderr, on the first node only.

    Returns:
        the secrets that the configuration writes out, as `[notify]` keys and values.
    """
    if settings.launch.node_rank:
        return {}
    for remark in [*secret_remarks(settings), *package_remarks(settings)]:
        print(f"warning: {remark}", file=sys.stderr)
    return secret.find_written_secrets(settings.notify)


def secret_remarks(settings: GuardConfig) -> list[str]:
    """Return a sentence for each secret that is written out, or masked and not given again."""
    remarks = []
    for name in secret.find_written_secrets(settings.notify):
        remarks.append(
            f'notify.{name} is written out: use {{ env = "NAME" }} or {{ file = "PATH" }}. '
            "It is masked in the run directory, so a resume needs it again"
        )
    for key in secret.find_missing_secrets(msgspec.to_builtins(settings.notify)):
        remarks.append(
            f"{key} was written out and is masked in the run directory. The run continues without "
            f"this notification. To have it again: --set {key}=VALUE"
        )
    return remarks


def package_remarks(settings: GuardConfig) -> list[str]:
    """Return a sentence for each missing package that the run can do without."""
    if not settings.tensorboard.enabled or is_installed("tensorboard"):
        return []
    return [
        "tensorboard is not installed, so this run writes no TensorBoard files. "
        f"To have them: {install_hint('tensorboard')}. "
        "To hide this: --set tensorboard.enabled=false"
    ]


def _dump_shared(settings: GuardConfig) -> str:
    """Return the configuration that all nodes read, as TOML."""
    launch = msgspec.structs.replace(settings.launch, node_rank=0)
    return dump_toml(msgspec.structs.replace(settings, launch=launch))


def load_settings(
    path: str, overrides: tuple[str, ...] = (), *, of_run: bool = False
) -> GuardConfig:
    """Return the checked configuration of a file.

    The trainer's package is searched in the current folder last.

    Raises:
        ConfigError: as for `load_trainer_config`.
    """
    tree = read_toml(Path(path), of_run=of_run)
    package = _table(tree, "launch").get("trainer", "trainer")
    for override in overrides:
        if override.partition("=")[0].strip() == "launch.trainer":
            package = override.partition("=")[2].strip().strip("\"'")
    top = package.partition(".")[0] if isinstance(package, str) else ""
    if top.isidentifier() and importlib.util.find_spec(top) is None:
        sys.path.append(os.getcwd())
    return build_config(tree, file=path, overrides=overrides, base=Path.cwd())


def _table(tree: dict[str, Any], name: str) -> dict[str, Any]:
    table = tree.get(name)
    return table if isinstance(table, dict) else {}


def _await_first_node(path: Path) -> RunDirectory:
    """Return the run directory of the first node, which the other nodes join.

    Raises:
        RunDirectoryError: it is not there within FIRST_NODE_SECONDS.
    """
    deadline = time.monotonic() + FIRST_NODE_SECONDS
    while not (path / "config.toml").exists():
        if time.monotonic() > deadline:
            raise RunDirectoryError(
                f"{path}: the first node (launch.node_rank = 0) has not made this run"
            )
        time.sleep(0.2)
    return RunDirectory.open(path)


# -- resuming a run


def prepare_resume(spec: str, overrides: tuple[str, ...], *, root: str) -> Prepared | None:
    """Make an ended run ready to continue. Ranks that outlived their supervisor save and stop first.

    Returns:
        None if the run is finished.

    Raises:
        RunDirectoryError: there is no such run, or it is running.
        ConfigError: an override would make it another run.
    """
    run = find_run(spec, root)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(CHANGEABLE):
            if "=" not in override:
                key = mask_override(override)
            names = ", ".join(name.rstrip(".") for name in CHANGEABLE)
            raise ConfigError(
                "a key that a resumed run may change", file="--set", key=key, hint=names
            )
    file = str(run.path / "config.toml")
    if is_custom_loop(Path(file)):
        raise RunDirectoryError(
            f"{run.name} was not started by guardrail launch, so only its own script can continue "
            f"it\n  hint: start the script again with run=RunDirectory.open({str(run.path)!r})",
            kind="custom_loop",
        )
    settings = load_settings(file, overrides, of_run=True)
    lock = _start_lock(run) if settings.launch.node_rank == 0 else None
    try:
        prepared = _prepare_ended(run, settings, file, overrides)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    if prepared is None:
        if lock is not None:
            lock.release()
        return None
    return prepared._replace(lock=lock)


def _start_lock(run: RunDirectory) -> RunLock:
    """Return the lock of a resume. Raises RunDirectoryError while another command holds it."""
    path = run.path / "launch.lock"
    try:
        return RunLock(path, "guardrail launch --resume")
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror or error}") from error
    except RunDirectoryError:
        holder = holder_of(path)
        who = "" if holder is None else f" ({holder.sentence()})"
        hint = f"to watch it: guardrail attach {run.name}"
        raise RunDirectoryError(
            f"{run.name} is being started by another command{who}\n  hint: {hint}"
        ) from None


def _prepare_ended(
    run: RunDirectory, settings: GuardConfig, file: str, overrides: tuple[str, ...]
) -> Prepared | None:
    from guardrail.launch import preflight

    if settings.launch.node_rank == 0:  # the other nodes join a running run
        status = run.known_status()
        refuse_alive(run, status)
        if (
            status is not None
            and status.phase is Phase.FINISHED
            and not overrides
            and _end_was_saved(run)
        ):
            print(
                f"{run.name} has finished at step {status.step}; there is nothing to resume",
                file=sys.stderr,
            )
            return None
    preflight.check_launch(settings, file=file, overrides=overrides)
    end_orphans(run, settings.launch.stop_timeout)
    if settings.launch.node_rank == 0:
        _refuse_stale(run)
    written_out = _warn_before_launch(settings)
    if (overrides or written_out) and settings.launch.node_rank == 0:
        run.write_config(_dump_shared(settings))
    return Prepared(run, settings.launch.node_rank, written_out)


def _end_was_saved(run: RunDirectory) -> bool:
    """Return whether the last steps of a finished run are on disk. An older version may not have
    saved them.
    """
    ends = [event for event in run.events() if isinstance(event, Ended)]
    return not ends or ends[-1].saved is not False


def _refuse_stale(run: RunDirectory) -> None:
    """Refuse the commands that were sent before the run ended: an old stop must not end the next
    start.

    A command for a later step waits for that step.
    """
    status = run.known_status()
    reached = status.step if status is not None else 0
    for command in run.commands_pending():
        if command.at_step <= reached:
            reason = "it was sent before the run was resumed. Send it again if you still want it"
            run.answer(command, applied=False, reason=reason, step=reached)


def refuse_alive(run: RunDirectory, status: Status | None) -> None:
    """Raise RunDirectoryError if a supervisor works on this run.

    Ranks that outlived their supervisor on this host do not count.
    """
    if status is None or not is_alive(run, status):
        return
    supervisor = processes.supervisor_of(run.path, status.supervisor_pid)
    if status.host == socket.gethostname() and supervisor is None:
        return
    if status.phase.ended:
        raise RunDirectoryError(
            f"{run.name} has {status.phase.value} at step {status.step}, but its processes have not "
            "ended yet\n  hint: try again in a few seconds",
            kind="ending",
        )
    raise RunDirectoryError(
        f"{run.name} is running on {clean_text(status.host, 80)}\n"
        f"  hint: guardrail attach {run.name}, or guardrail ctl {run.name} stop",
        kind="running",
    )


def end_orphans(run: RunDirectory, seconds: float) -> None:
    """Let processes of the run without a supervisor save and stop for `seconds`, then kill them.

    Raises:
        RunDirectoryError: the kernel does not end them.
    """
    orphans = processes.orphans_of(run.path)
    if not orphans:
        return
    count = format_plural(len(orphans), "process")
    print(f"{count} of {run.name} without a supervisor: save and stop", file=sys.stderr)
    pids = {process.pid for process in orphans}
    ranks = [report for report in run.read_ranks() if report.pid in pids]
    by_pid = {process.pid: process for process in orphans}
    for report in ranks:
        processes.send_signal(by_pid[report.pid], signal.SIGUSR1)
    deadline = time.monotonic() + (seconds if ranks else 0.0)
    while time.monotonic() < deadline and any(
        processes.alive(by_pid[report.pid]) for report in ranks
    ):
        time.sleep(0.1)
    for _ in range(3):  # an elastic agent that ends last may have started a rank again
        left = processes.orphans_of(run.path)
        left.sort(key=lambda process: process.pid)  # agents are older than their ranks
        if stuck := processes.kill(left):
            raise RunDirectoryError(
                f"{run.name}: processes {[process.pid for process in stuck]} cannot be ended"
            )
