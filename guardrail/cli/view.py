"""guardrail view: show the screen of a recorded run, of guardrail or of another program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from guardrail.cli.common import (
    can_draw,
    column_option,
    config_option,
    has_terminal,
    parse_columns,
    screen_options,
    set_guard_option,
    show_screen,
)
from guardrail.core.text import clean_text

if TYPE_CHECKING:
    from guardrail.backtest.recorded_run import RecordedRun
    from guardrail.core.guard_options import GuardOptions


@click.command()
@click.argument("log")
@column_option
@config_option("Judge with [guard] of this TOML file.")
@set_guard_option
@screen_options
def command(
    log: str,
    columns: tuple[str, ...],
    policy: str | None,
    overrides: tuple[str, ...],
    theme: str | None,
    no_mouse: bool,
) -> int:
    """Show LOG on the screen: its curves, and the incidents that the guard would find in it.

    LOG is one recorded run of a kind that `guardrail backtest` reads. Nothing is written. A run
    directory of guardrail is shown with what happened in it. With --config or --set, it is shown
    with what those settings would have done. With TERM=dumb, view prints lines.
    """
    from guardrail.backtest import recorded_run as viewing
    from guardrail.core.config import load_guard_options

    if not has_terminal():
        raise click.UsageError(f"view needs a terminal. Without one: guardrail backtest {log}")
    given = policy is not None or bool(overrides)
    settings = load_guard_options(policy, overrides=overrides)
    if not can_draw():
        return _print_lines(log, columns, settings, given=given)

    def screen() -> int:
        from guardrail.tui.app.app import run_log, run_screen

        if viewing.is_run_directory(log) and not given:
            return run_screen(log, read_only=True, theme=theme, mouse=not no_mouse)
        background = viewing.Background(
            viewing.RecordedRun(viewing.read_one_log(log, parse_columns(columns)), settings)
        )
        try:
            return run_log(background, theme=theme, mouse=not no_mouse)
        finally:
            background.close()

    return show_screen(screen)


def _print_lines(log: str, columns: tuple[str, ...], settings: GuardOptions, *, given: bool) -> int:
    """Print what the screen would show, on stderr, for a terminal that takes plain lines only."""
    from guardrail.backtest import recorded_run as viewing
    from guardrail.launch.log_printer import attach_run
    from guardrail.rundir.run_directory import RunDirectory

    if viewing.is_run_directory(log) and not given:
        return attach_run(RunDirectory.open(log))
    recorded = viewing.RecordedRun(viewing.read_one_log(log, parse_columns(columns)), settings)
    for line in format_recorded_run(recorded):
        click.echo(line, err=True)
    return 0


def format_recorded_run(recorded: RecordedRun) -> Iterator[str]:
    """Yield what a log of another program is, and what the guard would have done."""
    from guardrail.decide.advised_incidents import AdvisedIncidents
    from guardrail.launch.log_printer import format_event

    rows = f"{len(recorded):,} rows ({recorded.format})"
    yield f"{clean_text(recorded.name, 400)}: {rows}, last step {recorded.last_step:,}"
    advised = AdvisedIncidents()
    is_empty = True
    for part in recorded.judged_parts():
        for event in part.events:
            if advised.is_repeated(event):
                continue
            if line := format_event(event):
                is_empty = False
                yield line
    if is_empty:
        yield "the guard would have done nothing"
