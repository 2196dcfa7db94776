"""guardrail tune: thresholds for runs like the recorded ones."""

from __future__ import annotations

import click

from guardrail.cli.backtest import log_options, read_logs
from guardrail.cli.common import FiniteFloat, FirstNameOption


@click.command(short_help="Propose a [guard] section for recorded runs.")
@log_options
@click.option(
    "--config",
    "--policy",
    "policy",
    cls=FirstNameOption,
    metavar="FILE",
    help="Start from [guard] of this TOML file.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="guard.KEY=VALUE",
    help="Override a setting; repeatable.",
)
@click.option(
    "--budget",
    default=1.0,
    show_default=True,
    metavar="N",
    type=FiniteFloat(min=0.0),
    help="Single rejections in 10,000 records that a run may cost.",
)
def command(
    logs: tuple[str, ...],
    columns: tuple[str, ...],
    policy: str | None,
    overrides: tuple[str, ...],
    budget: float,
) -> int:
    """Propose a [guard] section for runs like these: how many alarms there would have been at which
    thresholds.

    Prints TOML on stdout, with the numbers behind it as comments, and writes no file. LOG... is
    what `backtest` reads. The logs should be of runs that went well for the most part.

    Exit code 2 if nothing could be read.
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
    proposals = tune.tune(
        read, settings, budget=budget, say=lambda text: click.echo(f"trying {text}", err=True)
    )
    for line in tune.toml(proposals, read, budget=budget):
        click.echo(line)
    return ExitCode.FINISHED
