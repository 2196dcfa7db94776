"""guardrail launch: check, create the run directory, start the supervisor, watch the run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from guardrail.cli.common import (
    can_draw,
    complete_configuration,
    complete_run,
    no_garbage_collection,
    root_option,
    screen_options,
    set_option,
    show_screen,
)

if TYPE_CHECKING:
    import subprocess

    from guardrail.rundir.run_directory import RunDirectory


@click.command()
@click.argument(
    "config", required=False, metavar="CONFIG.toml", shell_complete=complete_configuration
)
@click.option(
    "--headless",
    is_flag=True,
    help="Print lines instead of the screen. The default without a terminal.",
)
@click.option("--detach", is_flag=True, help="Return as soon as the run has started.")
@click.option(
    "--run-dir",
    metavar="DIR",
    help="Use this folder as the run directory, not ROOT/NAME/DATE-NN.",
)
@set_option
@click.option(
    "--resume",
    metavar="RUN",
    shell_complete=complete_run,
    help="Continue a run that has ended or crashed, with its saved configuration.",
)
@root_option
@click.option("--read-only", is_flag=True, help="The screen sends no commands.")
@screen_options
def command(
    config: str | None,
    headless: bool,
    detach: bool,
    run_dir: str | None,
    overrides: tuple[str, ...],
    resume: str | None,
    root: str,
    read_only: bool,
    theme: str | None,
    no_mouse: bool,
) -> int:
    """Start a training run and watch it.

    `launch` prints the run directory on stdout. The run has its own session: it continues when you
    close the terminal, leave the screen or press Ctrl-C. `guardrail ctl RUN stop` ends the run.
    """
    from guardrail.core.errors import ExitCode
    from guardrail.launch import launcher, supervisor_process

    if (config is None) == (resume is None):
        raise click.UsageError("give either CONFIG.toml or --resume RUN")
    if resume is not None:
        if run_dir is not None:
            raise click.UsageError(
                "--run-dir and --resume exclude each other: a run keeps its directory"
            )
        prepared = launcher.prepare_resume(resume, overrides, root=root)
        if prepared is None:
            return 0
    else:
        assert config is not None
        prepared = launcher.prepare_run(config, overrides, run_dir, root=find_given_root(overrides))
    run = prepared.run
    try:
        with prepared.lock or contextlib.nullcontext():
            supervisor = supervisor_process.start_supervisor(
                run, prepared.node_rank, prepared.secrets
            )
    except supervisor_process.StartInterrupted:
        print(run.path, flush=True)
        return leave_run(run)
    print(run.path, flush=True)
    if detach:
        return 0
    try:
        if headless or not can_draw():
            from guardrail.launch.log_printer import follow_run

            past = None if resume is None else 0
            code = follow_run(run, supervisor, past=past)
        else:
            code = watch_on_screen(
                run, supervisor, read_only=read_only, theme=theme, mouse=not no_mouse
            )
    except KeyboardInterrupt:
        if supervisor_process.find_exit_code(supervisor) is not None:
            raise
        return leave_run(run)
    if code == ExitCode.WORKERS_FAILED:
        run.check_writable()  # on a full disk the journal cannot hold the reason
    return code


def leave_run(run: RunDirectory) -> int:
    """Print how to return to a run that continues, and return the exit code of Ctrl-C."""
    import sys

    from guardrail.core.errors import ExitCode
    from guardrail.launch.supervisor_process import format_way_back

    print(f"training continues\n{format_way_back(run)}", file=sys.stderr)
    return ExitCode.INTERRUPTED


def find_given_root(overrides: tuple[str, ...]) -> str | None:
    """Return the folder of all runs that --root or $GUARDRAIL_ROOT names, else None.

    It replaces `run.root` of the file. --set run.root=DIR replaces the variable, but not --root.
    """
    context = click.get_current_context()
    source = context.get_parameter_source("root")
    if source is ParameterSource.COMMANDLINE:
        return str(context.params["root"])
    is_overridden = any(text.partition("=")[0].strip() == "run.root" for text in overrides)
    if source is ParameterSource.ENVIRONMENT and not is_overridden:
        return str(context.params["root"])
    return None


def watch_on_screen(
    run: RunDirectory,
    supervisor: subprocess.Popen[bytes],
    *,
    read_only: bool,
    theme: str | None,
    mouse: bool,
) -> int:
    """Show the screen, and return the run's exit code.

    Of a run that continues, the commands to return to it are printed, and 0 is returned.
    """
    import sys
    import time

    from guardrail.launch.supervisor_process import find_exit_code, format_way_back

    def screen() -> int:
        with no_garbage_collection():
            from guardrail.tui.app.app import run_screen

        return run_screen(run.path, read_only=read_only, theme=theme, mouse=mouse)

    show_screen(screen)
    # The screen ends with the run; the supervisor writes the exit code shortly after.
    deadline = time.monotonic() + 2.0
    status = run.read_status()
    while (
        status is not None
        and status.phase.ended
        and time.monotonic() < deadline
        and supervisor.poll() is None
    ):
        time.sleep(0.05)
    code = find_exit_code(supervisor)
    if code is None:
        print(f"training continues\n{format_way_back(run)}", file=sys.stderr)
        return 0
    return code
