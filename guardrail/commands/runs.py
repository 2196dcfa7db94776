"""guardrail runs: a table of the runs under a root."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from guardrail.commands.common import json_option, print_json, root_option

if TYPE_CHECKING:
    from guardrail.rundir import RunDirectory


@click.command(short_help="List the runs.")
@json_option
@root_option
def command(as_json: bool, root: str) -> None:
    """List the runs, the newest first."""
    from guardrail.rundir import list_runs

    rows = [describe(run) for run in list_runs(root)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(f"no runs in {root}", err=True)
        return
    width = max(len(row["run"]) for row in rows)
    click.echo(f"{'RUN':<{width}}  {'STATE':<9}  {'STEP':>15}  {'EXIT':>4}  {'LAST SIGN':>12}")
    for row in rows:
        step = f"{row['step']:,} / {row['total_steps']:,}" if row["total_steps"] else f"{row['step']:,}"
        code = "" if row["exit_code"] is None else row["exit_code"]
        click.echo(f"{row['run']:<{width}}  {row['state']:<9}  {step:>15}  {code:>4}  {ago(row['heartbeat']):>12}")


def describe(run: RunDirectory) -> dict[str, Any]:
    """What the table and --json say of a run. `state` is its phase, or "lost" if nobody keeps the status fresh."""
    from guardrail.launching import is_alive
    from guardrail.text import clean

    status = run.read_status()
    state = "new" if status is None else status.phase.value
    if status is not None and not status.phase.ended and not is_alive(run, status):
        state = "lost"
    return {
        "run": clean(run.name, 120),
        "path": str(run.path),
        "state": state,
        "step": status.step if status else 0,
        "total_steps": status.total_steps if status else 0,
        "exit_code": status.exit_code if status else None,
        "heartbeat": status.heartbeat if status else 0.0,
        "host": clean(status.host, 80) if status else "",
    }


def ago(moment: float) -> str:
    """ "3 s ago", "2 h ago"; "" for never."""
    seconds = max(0.0, time.time() - moment)
    if not moment:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"
