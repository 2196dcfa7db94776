"""guardrail doctor: what this machine can do."""

from __future__ import annotations

import click

from guardrail.commands.common import json_option, print_json


@click.command(short_help="Say what this machine can do.")
@click.argument("config", required=False, metavar="[CONFIG.toml]")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable.")
@json_option
def command(config: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Say what this machine can do, and what of a configuration will not work on it.

    Exit code 2 if the configuration cannot run here.
    """
    from guardrail import doctor

    report = doctor.examine(config, overrides)
    if as_json:
        print_json(report)
    else:
        for line in doctor.lines(report):
            click.echo(line)
    return doctor.exit_code(report)
