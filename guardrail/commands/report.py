"""guardrail report: what happened in a run."""

from __future__ import annotations

import click

from guardrail.commands.common import json_option, print_json, root_option, the_run


@click.command(short_help="Say what happened in a run.")
@click.argument("run", required=False)
@json_option
@click.option("--quarantine", is_flag=True, help="Only the sample ids that were left out, one a line.")
@root_option
def command(run: str | None, as_json: bool, quarantine: bool, root: str) -> None:
    """Say what happened in a run: incidents with their evidence and documents, commands, checkpoints, restarts.

    --quarantine prints the format that `[data] quarantine = "FILE"` reads.
    """
    from guardrail import report

    if as_json and quarantine:
        raise click.UsageError("--json and --quarantine are two answers; ask for one")
    found = the_run(run, root)
    if quarantine:
        for line in report.quarantine_lines(found):
            click.echo(line)
    elif as_json:
        print_json(report.as_dict(found))
    else:
        click.echo(report.text(found))
