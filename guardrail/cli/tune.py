"""guardrail tune: propose thresholds for runs like the recorded ones."""

from __future__ import annotations

import click

from guardrail.cli.backtest import log_options, read_logs
from guardrail.cli.common import FiniteFloat, config_option, set_guard_option


@click.command()
@log_options
@config_option("Start from [guard] of this TOML file.")
@set_guard_option
@click.option(
    "--budget",
    default=1.0,
    show_default=True,
    metavar="N",
    type=FiniteFloat(min=0.0),
    help="Single rejections in 10,000 records that a healthy run may have.",
)
def command(
    logs: tuple[str, ...],
    columns: tuple[str, ...],
    policy: str | None,
    overrides: tuple[str, ...],
    budget: float,
) -> int:
    """Print detection thresholds that fit recorded runs, as a [guard] section.

    `tune` counts the alarms that each threshold would have raised in these runs. It prints TOML on
    stdout, with these counts as comments, and writes no file. LOG... is what `backtest` reads.
    Most of each run should be healthy.

    Exit code 2: nothing could be read.
    """
    from guardrail.backtest import tune
    from guardrail.core.config import load_guard_options
    from guardrail.core.errors import ExitCode

    settings = load_guard_options(policy, overrides=overrides)
    read = list(read_logs(logs, columns, settings.extra_signals))
    if not read:
        return ExitCode.USAGE
    for log in read:
        for note in log.notes:
            click.echo(f"{log.path}: {note}", err=True)
    proposals = tune.propose_thresholds(
        read, settings, budget=budget, report=lambda text: click.echo(f"trying {text}", err=True)
    )
    for line in tune.format_toml(proposals, read, budget=budget):
        click.echo(line)
    return ExitCode.FINISHED
