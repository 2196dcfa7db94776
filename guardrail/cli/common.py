"""Options and output functions that several commands share."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import click

from guardrail.cli import theme_names as themes
from guardrail.core.text import escape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from click.shell_completion import CompletionItem

    from guardrail.rundir.run_directory import RunDirectory

root_option = click.option(
    "--root",
    default="runs",
    show_default=True,
    envvar="GUARDRAIL_ROOT",
    metavar="DIR",
    help="Folder of all runs ($GUARDRAIL_ROOT).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for a script.")
column_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="SIGNAL=NAME",
    help="Name of the column that holds a signal; repeatable.",
)


def _make_set_option(metavar: str) -> Callable[[Any], Any]:
    return click.option(
        "--set", "overrides", multiple=True, metavar=metavar, help="Set a key; repeatable."
    )


set_option = _make_set_option("SECTION.KEY=VALUE")
set_guard_option = _make_set_option("guard.KEY=VALUE")


class FirstNameOption(click.Option):
    """An option whose help shows only its first name; the others are its old names."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


def config_option(help: str) -> Callable[[Any], Any]:
    """Return the option `policy`: a TOML file with [guard]."""
    return click.option(
        "--config", "--policy", "policy", cls=FirstNameOption, metavar="FILE", help=help
    )


def screen_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options `theme` and `no_mouse`."""
    theme = click.option(
        "--theme",
        type=click.Choice(themes.THEMES),
        envvar=themes.ENVIRONMENT,
        help=f"Colours of the screen (${themes.ENVIRONMENT}). "
        "Default: dark; on a terminal with few colours, the terminal's own.",
    )
    no_mouse = click.option(
        "--no-mouse", is_flag=True, help="Let the terminal use the mouse, to select text."
    )
    return theme(no_mouse(command))


def has_terminal() -> bool:
    """Return whether a terminal is there for keys (stdin), output, and the screen (stderr)."""
    import sys

    return sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()


def can_draw() -> bool:
    """Return whether a screen can be drawn. TERM = dumb, or no TERM, takes plain lines only."""
    return has_terminal() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def show_screen(screen: Callable[[], int]) -> int:
    """Run a screen in its own process, and return its exit code.

    However that process ends, the terminal stays usable.
    """
    from guardrail.tui.terminal.screen_process import in_child

    return in_child(screen)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn off garbage collection around the import of a large library.

    Its objects stay, and collecting takes a tenth of the import. They are not scanned later either.
    """
    import gc

    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_run(spec: str | None, root: str) -> RunDirectory:
    """Return the run that RUN names on a command line.

    Args:
        spec: a path, NAME, NAME/DATE-NN or the beginning of one; None: the newest run.
        root: folder of all runs.

    Raises:
        RunDirectoryError: there is no such run.
    """
    from guardrail.rundir.run_search import find_run

    return find_run(spec, root)


def root_folder() -> str:
    """Return the folder of all runs where no option names one."""
    return os.environ.get("GUARDRAIL_ROOT") or "runs"


def complete_run(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of runs for shell completion, the newest first."""
    from guardrail.rundir.run_search import list_runs

    root = context.params.get("root") or root_folder()
    return [run.name for run in list_runs(root) if run.name.startswith(incomplete)]


def complete_configuration(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete the names of files."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


class FiniteFloat(click.FloatRange):
    """A number that is neither NaN nor infinite.

    A range alone accepts NaN: every comparison with it is false.
    """

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        import math

        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def parse_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """Return the name of the column of each signal, from `--column SIGNAL=NAME`.

    Raises:
        click.UsageError: a text is not SIGNAL=NAME.
    """
    names = {}
    for text in columns:
        signal, equals, name = text.partition("=")
        if not equals or not signal or not name:
            raise click.UsageError(
                f"--column {escape_text(text, 160)}: expected SIGNAL=NAME, e.g. loss=train/ce"
            )
        names[signal] = name
    return names


def print_json(value: Any) -> None:
    """Print one JSON document of records, paths and plain data, NaN and Inf as text."""
    import msgspec

    from guardrail.core.files import encode_json

    click.echo(msgspec.json.format(encode_json(value), indent=2).decode())
