"""guardrail backtest: print what the guard would have done in recorded runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from guardrail.cli.common import (
    column_option,
    config_option,
    json_option,
    parse_columns,
    print_json,
    set_guard_option,
)
from guardrail.core.text import escape_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guardrail.backtest.importers.recorded_log import Log
    from guardrail.backtest.importers.sources import Source
    from guardrail.backtest.result import BacktestResult
    from guardrail.backtest.scoring import Marks
    from guardrail.core.guard_options import GuardOptions


MAX_LABEL_CHARACTERS = 16 << 20  # of a file of labels; one of 37 runs has 30,000


def log_options(function: Any) -> Any:
    """Add the arguments that `backtest` and `tune` share."""
    logs = click.argument("logs", nargs=-1, required=True, metavar="LOG...")
    return logs(column_option(function))


class BacktestCommand(click.Command):
    """Lists in its help what the importers read. They are loaded only to print it."""

    def format_help_text(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from guardrail.backtest.importers.registry import list_formats

        self.help = (self.help or "").replace("{formats}", list_formats().replace("`", ""))
        super().format_help_text(context, formatter)


@click.command(cls=BacktestCommand)
@log_options
@config_option("Take [guard] from this TOML file.")
@set_guard_option
@click.option(
    "--labels", metavar="FILE", help="Score the verdicts against the labels of this JSON file."
)
@click.option("--plot", metavar="DIR", help="Draw each run into this folder (needs matplotlib).")
@click.option("--svg", is_flag=True, help="Draw SVG instead of PNG.")
@json_option
def command(
    logs: tuple[str, ...],
    columns: tuple[str, ...],
    policy: str | None,
    overrides: tuple[str, ...],
    labels: str | None,
    plot: str | None,
    svg: bool,
    as_json: bool,
) -> int:
    """Judge recorded runs with the code that judges a live run; print what it would have done.

    `backtest` reads {formats}. Folders are searched. A run directory is judged with its own settings, unless
    --config or --set is given.

    Exit code 2: nothing could be read. A log that could not be read is named on stderr.
    """
    from guardrail.backtest import backtest, plotting, result_text
    from guardrail.core.config import load_guard_options
    from guardrail.core.errors import ExitCode

    settings = load_guard_options(policy, overrides=overrides)
    given = policy is not None or bool(overrides)
    marks = _read_labels(labels) if labels is not None else None
    if plot is not None:
        plotting.require_matplotlib()
    results = []
    for log in read_logs(logs, columns, settings.extra_signals, required=_sets_signals(overrides)):
        chosen, own = _settings_for(log, settings, given=given)
        track = plotting.BandRecorder(log) if plot is not None else None
        result = backtest.run_backtest(log, chosen, own=own, watch=track)
        for note in (*log.notes, *result.messages):
            click.echo(f"{log.path}: {note}", err=True)
        if track is not None and plot is not None:
            click.echo(f"drew {plotting.draw_run(log, result, track, plot, svg=svg)}", err=True)
        results.append(result)
        if not as_json:
            for line in result_text.format_result(result):
                click.echo(line)
    if not results:
        return ExitCode.USAGE
    scored = _score_results(marks, results) if marks is not None else None
    if as_json:
        answer: dict[str, Any] = {"runs": [result.as_dict() for result in results]}
        answer["summary"] = result_text.sum_results(results)
        if scored is not None:
            answer["figures"], answer["scored"] = (
                scored[0],
                {name: vars(mark) for name, mark in scored[1].items()},
            )
        print_json(answer)
    else:
        for line in result_text.format_summary(results):
            click.echo(line)
        if scored is not None:
            for line in _format_scores(*scored):
                click.echo(line)
    return ExitCode.FINISHED


def _sets_signals(overrides: tuple[str, ...]) -> bool:
    return any(text.partition("=")[0].strip() == "guard.extra_signals" for text in overrides)


def read_logs(
    paths: tuple[str, ...],
    columns: tuple[str, ...],
    signals: tuple[str, ...] = (),
    *,
    required: bool = False,
) -> Iterator[Log]:
    """Yield the logs at `paths`. One that cannot be read is named on stderr.

    Args:
        columns: SIGNAL=NAME each; a log without such a column is not read.
        signals: further signals to judge, each the name of a column or its name in `names.FURTHER`.
        required: a log without one of `signals` is not read. If False, it is read without that
            signal, with a note.
    """
    from guardrail.backtest.importers.sources import find_sources
    from guardrail.core.errors import DataError

    given = parse_columns(columns)
    wanted = {signal: signal for signal in signals if signal not in given}
    for source in find_sources(paths):
        try:
            yield from _read_source(source, given, wanted, required=required)
        except (DataError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"{source.path}: {error.strerror or error}"
            click.echo(f"guardrail: {reason}", err=True)


def _read_source(
    source: Source, given: dict[str, str], wanted: dict[str, str], *, required: bool
) -> list[Log]:
    from guardrail.backtest.importers.names import ColumnError

    missing: dict[str, str] = {}  # signal -> why
    while True:
        try:
            present = {signal: name for signal, name in wanted.items() if signal not in missing}
            logs = source.read(present | given)
            break
        except ColumnError as error:
            if required or error.signal not in wanted or error.signal in given:
                raise
            missing[error.signal] = str(error)
    for log in logs:
        for reason in missing.values():
            log.notes.append(f"guard.extra_signals: {reason.removeprefix(log.path + ': ')}")
        if log.folder is not None:
            absent = [signal for signal in wanted if signal not in log.columns]
            for name in (*given, *absent):
                log.notes.append(f"{name} is not among the signals of this run directory")
    return logs


def _settings_for(log: Log, settings: GuardOptions, *, given: bool) -> tuple[GuardOptions, bool]:
    """Return the settings for a log, and whether they are those of its run directory.

    A run directory is judged with its own settings, unless the command line gives some.
    """
    from guardrail.core.config import load_guard_options

    if log.folder is None or given:
        return settings, False
    return load_guard_options(log.folder / "config.toml", of_run=True), True


def _read_labels(path: str) -> dict[str, Any]:
    import json

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_LABEL_CHARACTERS + 1)
        if len(text) > MAX_LABEL_CHARACTERS:
            raise click.UsageError(
                f"--labels {path}: expected at most {MAX_LABEL_CHARACTERS >> 20} MiB of JSON"
            )
        labels = json.loads(text)
    except RecursionError as error:
        raise click.UsageError(
            f"--labels {path}: not JSON (too many brackets within each other)"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise click.UsageError(f"--labels {path}: {reason}") from error
    if not isinstance(labels, dict):
        raise click.UsageError(f"--labels {path}: expected an object with one entry for each run")
    for name, label in labels.items():
        if not name.startswith("_"):
            _check_label(label, f"--labels {path}: {escape_text(name, 80)}")
    return labels


def _check_label(label: Any, place: str) -> None:
    """Refuse an entry that `scoring.score_runs` cannot use. Raises click.UsageError."""
    from guardrail.backtest.scoring import find_label_error

    if reason := find_label_error(label):
        raise click.UsageError(f"{place}: {escape_text(reason, 200)}")


def _score_results(
    labels: dict[str, Any], results: list[BacktestResult]
) -> tuple[dict[str, Any], dict[str, Marks]]:
    """Score the results against the labels of their runs.

    A label belongs to the run whose path, file or folder has its name.
    """
    from pathlib import Path

    from guardrail.backtest.scoring import score_runs

    runs = {}
    for result in results:
        path = Path(result.path)
        names = (result.path, path.name, path.stem, path.parent.name, path.absolute().parent.name)
        name = next((name for name in names if name in labels), None)
        if name is None:
            click.echo(f"{result.path}: no labels for it", err=True)
        else:
            runs[name] = result.steps, [(alarm.row, alarm.verdict) for alarm in result.alarms]
    return score_runs(labels, runs)


def _format_scores(total: dict[str, Any], marks: dict[str, Marks]) -> list[str]:
    """Return a table with a line for each run, and the totals."""
    width = max((len(name) for name in marks), default=3)
    table = [
        f"{'RUN':<{width}}  {'ACTED':>7}  {'NOTED':>7}"
        f"  FALSE: {'ROLLBACKS':>9} {'SKIPS':>5} {'NOTES':>5}  DELAYS"
    ]
    for name, mark in marks.items():
        acted, noted = f"{mark.acted}/{mark.grave}", f"{mark.noted}/{mark.labelled}"
        delays = " ".join(map(str, mark.delays))
        if mark.missing:
            delays += " (not given)"
        table.append(
            f"{name:<{width}}  {acted:>7}  {noted:>7}"
            f"         {mark.false_rollbacks:>9} {mark.false_skips:>5} {mark.false_notes:>5}"
            f"  {delays}"
        )
    return [*table, *(f"{name:<24} {value}" for name, value in total.items())]
