"""Between `guardrail launch` and the first step: checks, the run directory, the supervisor; and the
way back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from guardrail.core import secret
from guardrail.core.config import GuardConfig, build_config
from guardrail.core.errors import (
    ConfigError,
    ExitCode,
    RunDirectoryError,
    UsageError,
    WorkersFailed,
)
from guardrail.core.format import format_plural
from guardrail.core.overrides import find_source, mask_override
from guardrail.core.packages import install_hint, is_installed
from guardrail.core.records import Phase, Status
from guardrail.core.text import clean_text
from guardrail.core.toml_file import dump_toml, read_toml
from guardrail.rundir import processes
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_creation import NAME, is_run_name
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import RunLock, holder_of
from guardrail.rundir.run_search import find_run

START_SECONDS = 30.0  # for the supervisor's first word; it needs 0.2 on an idle machine

# Settings that a resumed run may change: how it is run, not what it computes. On another mesh it is
# the same training with additions in another order and other dice for dropout, which are functions
# of the data rank too.
CHANGEABLE = (
    *("launch.", "guard.", "snapshots.", "checkpoint.", "tensorboard.", "notify."),
    *("train.steps", "train.epochs", "train.eval_every", "train.eval_batches"),
    *("parallel.", "train.strategy", "train.micro_batch_size", "train.activation_checkpointing"),
)


class Prepared(NamedTuple):
    """A run directory that is ready to be worked on by node `node_rank`.

    `lock`: keeps every other resume of this run away until the supervisor has taken over. `secrets`
    are those of [notify] that were written out: the run's copy of the configuration does not hold
    them.
    """

    run: RunDirectory
    node_rank: int
    secrets: dict[str, Any]
    lock: RunLock | None = None


def prepare_run(
    path: str, overrides: tuple[str, ...], run_dir: str | None, *, root: str | None = None
) -> Prepared:
    """Load and check a configuration, check the machine, make the run directory. Raises ConfigError
    and its kin.

    Args:
        root: folder of all runs, instead of `run.root`.
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
    node_rank, text = settings.launch.node_rank, _shared(settings)
    written_out = _warn_before_launch(settings)
    if run_dir is not None:
        folder = Path(run_dir).absolute()
        run = _made_by_first_node(folder) if node_rank else RunDirectory.create_at(folder, text)
        return Prepared(run, node_rank, written_out)
    if node_rank:
        raise UsageError("a further node joins the run of the first one: give its --run-dir DIR")
    name = settings.run.name
    if not is_run_name(name):  # with --run-dir it names no folder
        source = find_source("run.name", file=path, overrides=overrides)
        raise ConfigError(NAME, file=source, key="run.name", value=name)
    return Prepared(RunDirectory.create(settings.run.root, name, text), node_rank, written_out)


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
    """A sentence for each secret that is written out, and for each one that was masked and not
    given again.
    """
    written = [
        f'notify.{name} is written out: use {{ env = "NAME" }} or {{ file = "PATH" }}. '
        "It is masked in the run directory, so a resume needs it again"
        for name in secret.find_written_secrets(settings.notify)
    ]
    masked = [
        f"{key} was written out and is masked in the run directory. The run goes on without this notification; "
        f"to have it again: --set {key}=VALUE"
        for key in secret.find_missing_secrets(msgspec.to_builtins(settings.notify))
    ]
    return written + masked


def package_remarks(settings: GuardConfig) -> list[str]:
    """Return a sentence for each missing package without which the run goes on with less."""
    if not settings.tensorboard.enabled or is_installed("tensorboard"):
        return []
    return [
        "tensorboard is not installed, so this run writes no TensorBoard files. "
        f"To have them: {install_hint('tensorboard')}. To hide this: --set tensorboard.enabled=false"
    ]


def _shared(settings: GuardConfig) -> str:
    """The configuration as all nodes read it."""
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


def _made_by_first_node(path: Path) -> RunDirectory:
    """The run directory that the other nodes of a run join."""
    deadline = time.monotonic() + START_SECONDS
    while not (path / "config.toml").exists():
        if time.monotonic() > deadline:
            raise RunDirectoryError(
                f"{path}: the first node (launch.node_rank = 0) has not made this run"
            )
        time.sleep(0.2)
    return RunDirectory.open(path)


# -- going on with a run


def prepare_resume(spec: str, overrides: tuple[str, ...], *, root: str) -> Prepared | None:
    """Make an ended run ready to go on; None if it has nothing left to do.

    Ranks that outlived their supervisor are asked to save and stop first.

    Raises:
        RunDirectoryError: no such run, or it is alive.
        ConfigError: an override that would make it another run.
    """
    run = find_run(spec, root)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(CHANGEABLE):
            hint = f"a resumed run may change {', '.join(name.rstrip('.') for name in CHANGEABLE)}"
            key = key if "=" in override else mask_override(override)
            raise ConfigError(
                "a setting that leaves the run the same", file="--set", key=key, hint=hint
            )
    file = str(run.path / "config.toml")
    settings = load_settings(file, overrides, of_run=True)
    lock = _start_lock(run) if settings.launch.node_rank == 0 else None
    try:
        prepared = _resumed(run, settings, file, overrides)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    if prepared is None and lock is not None:
        lock.release()
    return prepared._replace(lock=lock) if prepared is not None else None


def _start_lock(run: RunDirectory) -> RunLock:
    """Of two that resume a run at the same instant one holds it; RunDirectoryError for the
    other.
    """
    path = run.path / "launch.lock"
    try:
        return RunLock(path, "guardrail launch --resume")
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror or error}") from error
    except RunDirectoryError:
        holder = holder_of(path)
        who = f" ({holder.sentence()})" if holder is not None else ""
        hint = f"guardrail attach {run.name} watches it"
        raise RunDirectoryError(
            f"{run.name} is being started by another command{who}\n  hint: {hint}"
        ) from None


def _resumed(
    run: RunDirectory, settings: GuardConfig, file: str, overrides: tuple[str, ...]
) -> Prepared | None:
    from guardrail.launch import preflight

    if settings.launch.node_rank == 0:  # the other nodes join a run that lives
        status = run.known_status()
        refuse_alive(run, status)
        if (
            status is not None
            and status.phase is Phase.FINISHED
            and not overrides
            and _end_was_saved(run)
        ):
            print(
                f"{run.name} has finished at step {status.step}; nothing is left to do",
                file=sys.stderr,
            )
            return None
    preflight.check_launch(settings, file=file, overrides=overrides)
    end_orphans(run, settings.launch.stop_timeout)
    if settings.launch.node_rank == 0:
        _refuse_stale(run)
    written_out = _warn_before_launch(settings)
    if (overrides or written_out) and settings.launch.node_rank == 0:
        run.write_config(_shared(settings))
    return Prepared(run, settings.launch.node_rank, written_out)


def _end_was_saved(run: RunDirectory) -> bool:
    """False for a run that an older version called finished though its last steps are on no
    disk.
    """
    ends = [event for event in run.events() if event.kind == "ended"]
    return not ends or ends[-1].data.get("saved") is not False


def _refuse_stale(run: RunDirectory) -> None:
    """Answer what was sent to the run as it was before: a stop that found nobody must not end the
    next start.

    A command for a step that is still to come waits for that step, as it would have without the end
    in between.
    """
    status = run.known_status()
    reached = status.step if status is not None else 0
    for command in run.commands_pending():
        if command.at_step <= reached:
            reason = "it was sent before the run was started again; send it once more if it is still meant"
            run.answer(command, applied=False, reason=reason, step=reached)


def refuse_alive(run: RunDirectory, status: Status | None) -> None:
    """RunDirectoryError if a supervisor works on this run. Ranks that outlived theirs on this host
    do not count.
    """
    if status is None or not is_alive(run, status):
        return
    supervisor = processes.supervisor_of(run.path, status.supervisor_pid)
    if status.host == socket.gethostname() and supervisor is None:
        return
    if status.phase.ended:
        raise RunDirectoryError(
            f"{run.name} has {status.phase.value} at step {status.step}, and its processes are still ending\n"
            "  hint: try again in some seconds"
        )
    raise RunDirectoryError(
        f"{run.name} is running on {clean_text(status.host, 80)}\n"
        f"  hint: guardrail attach {run.name}, or guardrail ctl {run.name} stop"
    )


def end_orphans(run: RunDirectory, seconds: float) -> None:
    """Processes of the run whose supervisor is dead: save and stop, then kill."""
    orphans = processes.orphans_of(run.path)
    if not orphans:
        return
    several = "outlived their supervisor; they save and stop"
    words = "outlived its supervisor; it saves and stops" if len(orphans) == 1 else several
    print(f"{format_plural(len(orphans), 'process')} of {run.name} {words}", file=sys.stderr)
    pids = {process.pid for process in orphans}
    ranks = [report for report in run.read_ranks() if report.pid in pids]
    by_pid = {process.pid: process for process in orphans}
    for report in ranks:
        processes.tell(by_pid[report.pid], signal.SIGUSR1)
    deadline = time.monotonic() + (seconds if ranks else 0.0)
    while time.monotonic() < deadline and any(
        processes.alive(by_pid[report.pid]) for report in ranks
    ):
        time.sleep(0.1)
    for _ in range(3):  # an elastic agent that dies last may just have started a rank again
        left = processes.orphans_of(run.path)
        left.sort(key=lambda process: process.pid)  # agents are older than their ranks
        if stuck := processes.kill(left):
            raise RunDirectoryError(
                f"{run.name}: processes {[process.pid for process in stuck]} cannot be ended"
            )


# -- the supervisor


def start_supervisor(
    run: RunDirectory, node_rank: int = 0, secrets: dict[str, Any] | None = None
) -> subprocess.Popen[bytes]:
    """Start the supervisor in its own session and wait until it has taken over. Raises
    WorkersFailed, DiskRefuses.

    Args:
        secrets: of [notify], that the run directory does not hold. They go through a pipe, so that
            they stand in no command line, environment or file.
    """
    run.check_writable()
    variables = dict(os.environ)
    if secrets:
        variables[processes.SECRETS_VARIABLE] = "stdin"
    # The supervisor stands in /, so that it holds no folder: what is found from here must be found
    # from there.
    paths = [
        os.path.abspath(path) for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path
    ]
    paths += [path for path in sys.path if path == os.getcwd() and path not in paths]
    if paths:
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    log_path = run.logs / (f"supervisor-{node_rank}.log" if node_rank else "supervisor.log")
    offset = log_path.stat().st_size if log_path.exists() else 0
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                processes.SUPERVISOR_MODULE,
                str(run.path.resolve()),
                str(node_rank),
            ],
            stdin=subprocess.PIPE if secrets else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=variables,
            start_new_session=True,
        )
    if process.stdin is not None:
        # one that has died says why in its log
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(msgspec.json.encode(secrets))

    def has_taken_over() -> bool:
        if node_rank:  # the status is the first node's to write
            holder = holder_of(run.path / f"supervisor-{node_rank}.lock")
            return holder is not None and holder.pid == process.pid
        status = run.read_status()
        return status is not None and status.supervisor_pid == process.pid

    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if has_taken_over():
            return process
        time.sleep(0.02)
    if process.poll() is None or has_taken_over():
        return process  # a very slow machine; or it has ended already
    words = [clean_text(line, 500) for line in log_path.read_bytes()[offset:].splitlines()[-12:]]
    run.check_writable()  # it could not say so itself
    if process.returncode == ExitCode.USAGE:
        raise RunDirectoryError("\n".join(words))
    raise WorkersFailed("the supervisor did not start:\n" + "\n".join(words))


def find_exit_code(supervisor: subprocess.Popen[bytes]) -> int | None:
    """The run's exit code once its supervisor has ended, else None."""
    code = supervisor.poll()
    if code is None or code >= 0:
        return code
    return ExitCode.WORKERS_FAILED  # the supervisor itself was killed


def format_way_back(run: RunDirectory) -> str:
    return f"  guardrail attach {run.path}\n  guardrail ctl {run.path} stop"
