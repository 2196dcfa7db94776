"""guardrail launch: check, create the run directory, start the supervisor, then watch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from guardrail.cli.common import (
    can_draw,
    complete_configuration,
    complete_run,
    imports,
    root_option,
    screen_options,
    show_screen,
)

if TYPE_CHECKING:
    import subprocess

    from guardrail.rundir.run_directory import RunDirectory


@click.command(short_help="Start a training run and watch it.")
@click.argument(
    "config", required=False, metavar="CONFIG.toml", shell_complete=complete_configuration
)
@click.option(
    "--headless",
    is_flag=True,
    help="Print lines instead of the screen; the default without a terminal.",
)
@click.option("--detach", is_flag=True, help="Return as soon as the run lives.")
@click.option(
    "--run-dir",
    metavar="DIR",
    help="Use this folder as the run directory instead of ROOT/NAME/DATE-NN.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a setting; repeatable.",
)
@click.option(
    "--resume",
    metavar="RUN",
    shell_complete=complete_run,
    help="Go on with a run that has ended in any way, with its own configuration.",
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

    Prints the run directory on stdout. The run lives in its own session: closing the terminal,
    leaving the screen or Ctrl-C do not touch it; `guardrail ctl RUN stop` ends it.
    """

    from guardrail.core.errors import ExitCode
    from guardrail.launch import launcher as launching

    if (config is None) == (resume is None):
        raise click.UsageError("give either CONFIG.toml or --resume RUN")
    if resume is not None:
        if run_dir is not None:
            raise click.UsageError("--run-dir does not go with --resume: the run has its directory")
        prepared = launching.prepare_resume(resume, overrides, root=root)
        if prepared is None:
            return 0
    else:
        assert config is not None
        prepared = launching.prepare(config, overrides, run_dir, root=given_root(overrides))
    with prepared.lock or contextlib.nullcontext():
        supervisor = launching.start(prepared.run, prepared.node_rank, prepared.secrets)
    run = prepared.run
    print(run.path, flush=True)
    if detach:
        return 0
    if headless or not can_draw():
        from guardrail.launch.log_printer import follow

        code = follow(run, supervisor, past=None if resume is None else 0)
    else:
        code = show(run, supervisor, read_only=read_only, theme=theme, mouse=not no_mouse)
    if code == ExitCode.WORKERS_FAILED:
        run.check_writable()  # on a full disk the journal could not say why
    return code


def given_root(overrides: tuple[str, ...]) -> str | None:
    """The folder of all runs that --root or $GUARDRAIL_ROOT names, which wins over `run.root` of
    the file; else None.

    --set run.root=DIR is meant for this one run: it wins over the variable.
    """
    context = click.get_current_context()
    source = context.get_parameter_source("root")
    by_set = any(override.partition("=")[0].strip() == "run.root" for override in overrides)
    if source is ParameterSource.COMMANDLINE or (
        source is ParameterSource.ENVIRONMENT and not by_set
    ):
        return str(context.params["root"])
    return None


def show(
    run: RunDirectory,
    supervisor: subprocess.Popen[bytes],
    *,
    read_only: bool,
    theme: str | None,
    mouse: bool,
) -> int:
    """The screen; then the run's exit code, or how to come back to a run that goes on."""
    import sys
    import time

    from guardrail.launch.launcher import exit_code_of, way_back

    def screen() -> int:
        with imports():
            from guardrail.tui.app.app import run_screen

        return run_screen(run.path, read_only=read_only, theme=theme, mouse=mouse)

    show_screen(screen)
    # a run that the screen saw end is about to have its exit code
    deadline = time.monotonic() + 2.0
    status = run.read_status()
    while (
        status is not None
        and status.phase.ended
        and time.monotonic() < deadline
        and supervisor.poll() is None
    ):
        time.sleep(0.05)
    code = exit_code_of(supervisor)
    if code is None:
        print(f"training goes on\n{way_back(run)}", file=sys.stderr)
        return 0
    return code
