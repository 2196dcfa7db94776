"""guardrail runs: choose a run in a terminal, print a table elsewhere."""

from __future__ import annotations

import math
import time

import click

from guardrail.cli.common import (
    can_draw,
    json_option,
    print_json,
    root_option,
    screen_options,
    show_screen,
)
from guardrail.core.format import format_age


@click.command()
@json_option
@click.option("--plain", is_flag=True, help="Print the table in a terminal too.")
@click.option("--read-only", is_flag=True, help="The screen of a chosen run sends no commands.")
@screen_options
@root_option
def command(
    as_json: bool, plain: bool, read_only: bool, theme: str | None, no_mouse: bool, root: str
) -> int:
    """List the runs, the newest first.

    In a terminal, choose a run with the arrow keys and press Enter to watch it. Leaving its screen
    returns to the list.
    """
    from guardrail.operate.run_summary import RunSummary, summarize_runs
    from guardrail.rundir.liveness import HeartbeatObserver

    observer = HeartbeatObserver()

    def look() -> list[RunSummary]:
        return summarize_runs(root, observer.listed)

    if not (as_json or plain) and can_draw():

        def screen() -> int:
            from guardrail.tui.app.run_list import choose_and_watch

            return choose_and_watch(
                look, root=root, read_only=read_only, theme=theme, mouse=not no_mouse
            )

        return show_screen(screen)
    rows = look()
    # Runs of other hosts: their next heartbeat shows whether they are alive.
    while any(row.state == "unknown" for row in rows):
        time.sleep(0.2)
        rows = look()
    if as_json:
        print_json([row.as_dict() for row in rows])
        return 0
    if not rows:
        click.echo(f"no runs in {root}", err=True)
        return 0
    width = max(len(row.run) for row in rows)
    click.echo(
        f"{'RUN':<{width}}  {'STATE':<9}  {'STEP':>15}  {'LOSS':>8}  {'EXIT':>4}  {'LAST SIGN':>12}"
    )
    for row in rows:
        step = f"{row.step:,} / {row.total_steps:,}" if row.total_steps else f"{row.step:,}"
        code = "" if row.exit_code is None else row.exit_code
        loss = "" if row.loss is None else f"{row.loss:.4g}"
        sign = format_last_sign(row.heartbeat)
        line = f"{row.run:<{width}}  {row.state:<9}  {step:>15}  {loss:>8}  {code:>4}  {sign:>12}"
        click.echo(f"{line}  {row.unresolved}".rstrip())
    return 0


def format_last_sign(moment: float) -> str:
    """Return "3 s ago" or "2 h ago" of a time stamp, "" for 0 and for an impossible one."""
    if not 0.0 < moment < math.inf:
        return ""
    seconds = max(0.0, time.time() - moment)
    return f"{format_age(seconds)} ago"
