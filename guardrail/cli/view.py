"""guardrail view: the screen of a run that is over, or of a log that something else has written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from guardrail.cli.common import (
    FirstNameOption,
    can_draw,
    given_columns,
    has_terminal,
    screen_options,
    show_screen,
)
from guardrail.core.text import clean_text

if TYPE_CHECKING:
    from guardrail.backtest.recorded_run import RecordedRun
    from guardrail.core.guard_options import GuardOptions


@click.command(short_help="Look at a recorded log, or at a run directory.")
@click.argument("log")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="SIGNAL=NAME",
    help="Which column holds a signal; repeatable.",
)
@click.option(
    "--config",
    "--policy",
    "policy",
    cls=FirstNameOption,
    metavar="FILE",
    help="Judge by the [guard] of this TOML file.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="guard.KEY=VALUE",
    help="Override a setting; repeatable.",
)
@screen_options
def command(
    log: str,
    columns: tuple[str, ...],
    policy: str | None,
    overrides: tuple[str, ...],
    theme: str | None,
    no_mouse: bool,
) -> int:
    """The screen over LOG: its curves, and the incidents as the live controller would have seen
    them.

    Reads whatever `guardrail backtest` reads, one recorded run of it, and writes nothing. A run
    directory of guardrail is shown with what has happened in it; with --policy or --set, with what
    those settings would have said. With TERM=dumb it prints lines.
    """
    from guardrail.backtest import recorded_run as viewing
    from guardrail.core.config import load_guard_options

    if not has_terminal():
        raise click.UsageError(
            f"view needs a terminal; guardrail backtest {log} prints what it would show"
        )
    given = policy is not None or bool(overrides)
    settings = load_guard_options(policy, overrides=overrides)
    if not can_draw():
        return _print_lines(log, columns, settings, given=given)

    def screen() -> int:
        from guardrail.tui.app.app import run_log, run_screen

        if viewing.is_run(log) and not given:
            return run_screen(log, read_only=True, theme=theme, mouse=not no_mouse)
        background = viewing.Background(
            viewing.RecordedRun(viewing.the_log(log, given_columns(columns)), settings)
        )
        try:
            return run_log(background, theme=theme, mouse=not no_mouse)
        finally:
            background.close()

    return show_screen(screen)


def _print_lines(log: str, columns: tuple[str, ...], settings: GuardOptions, *, given: bool) -> int:
    """For a terminal that takes plain lines only: what the screen would show, on stderr."""
    from guardrail.backtest import recorded_run as viewing
    from guardrail.launch import log_printer as headless
    from guardrail.rundir.run_directory import RunDirectory

    if viewing.is_run(log) and not given:
        return headless.attach(RunDirectory.open(log))
    recorded = viewing.RecordedRun(viewing.the_log(log, given_columns(columns)), settings)
    for line in recorded_lines(recorded):
        click.echo(line, err=True)
    return 0


def recorded_lines(recorded: RecordedRun) -> Iterator[str]:
    """A log that something else has written: what it is, and what the guard would have said of
    it.
    """
    from guardrail.decide.advised_incidents import AdvisedIncidents
    from guardrail.launch.log_printer import event_line

    rows = f"{len(recorded):,} rows ({recorded.format})"
    yield f"{clean_text(recorded.name, 400)}: {rows}, last step {recorded.last_step:,}"
    advised, said = AdvisedIncidents(), 0
    for part in recorded.judged():
        for event in part.events:
            line = "" if advised.is_repeated(event) else event_line(event)
            said += bool(line)
            yield from [line] if line else []
    if not said:
        yield "the guard would have done nothing"
