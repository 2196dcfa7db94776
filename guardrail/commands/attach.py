"""guardrail attach: the screen of a run, or its lines where there is no terminal."""

from __future__ import annotations

import click

from guardrail.commands.common import root_option, the_run


@click.command(short_help="Watch a run, running or ended.")
@click.argument("run", required=False)
@click.option("--read-only", is_flag=True, help="Send no commands.")
@click.option("--headless", is_flag=True, help="Print lines instead of the screen; the default without a terminal.")
@root_option
def command(run: str | None, read_only: bool, headless: bool, root: str) -> int:
    """Watch a run, the newest one if none is named. Leaving, by q or Ctrl-C, does not touch it.

    Without a terminal it prints lines until the run has ended, and returns the run's exit code.
    """
    import sys

    found = the_run(run, root)
    if headless or not (sys.stdin.isatty() and sys.stdout.isatty()):
        from guardrail.headless import attach

        return attach(found)
    from guardrail.tui.app import run_screen

    run_screen(found.path, read_only=read_only)
    return 0
