"""guardrail doctor: check this machine, and a configuration on it."""

from __future__ import annotations

import click

from guardrail.cli.common import json_option, print_json, set_option


@click.command()
@click.argument("config", required=False, metavar="[CONFIG.toml]")
@set_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="The configuration is for other machines: check what can be checked here, and print what "
    "it needs of them.",
)
@json_option
def command(config: str | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> int:
    """Check this machine, and check whether a configuration can run on it.

    Exit code 2: the configuration cannot run here; with --dry-run, it cannot run on any machine.
    """
    if dry_run and config is None:
        raise click.UsageError(
            "--dry-run needs a configuration: guardrail doctor --dry-run CONFIG.toml"
        )
    from guardrail.launch import doctor

    report = doctor.check_machine(config, overrides, dry_run=dry_run)
    if as_json:
        print_json(report)
    else:
        for line in doctor.format_lines(report):
            click.echo(line)
    return doctor.find_exit_code(report)
