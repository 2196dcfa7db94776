"""guardrail doctor: what this machine can do."""

from __future__ import annotations

import click

from guardrail.cli.common import json_option, print_json


@click.command(short_help="Say what this machine can do.")
@click.argument("config", required=False, metavar="[CONFIG.toml]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a setting; repeatable.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Meant for other machines: check what can be, and say what it asks of them.",
)
@json_option
def command(config: str | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> int:
    """Say what this machine can do, and what of a configuration will not work on it.

    Exit code 2 if the configuration cannot run here; with --dry-run, if it cannot run anywhere.
    """
    if dry_run and config is None:
        raise click.UsageError(
            "--dry-run needs a configuration: guardrail doctor --dry-run CONFIG.toml"
        )
    from guardrail.launch import doctor

    report = doctor.examine(config, overrides, dry_run=dry_run)
    if as_json:
        print_json(report)
    else:
        for line in doctor.lines(report):
            click.echo(line)
    return doctor.exit_code(report)
