"""Options and small output helpers that several commands share."""

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


def screen_options(command: Callable[..., int]) -> Callable[..., int]:
    """How the screen looks: `theme` and `no_mouse`."""
    theme = click.option(
        "--theme",
        type=click.Choice(themes.THEMES),
        envvar=themes.ENVIRONMENT,
        help=f"Colours of the screen (${themes.ENVIRONMENT}). Default: dark, or the terminal's own where it has few.",
    )
    no_mouse = click.option(
        "--no-mouse", is_flag=True, help="Leave the mouse to the terminal, to select text."
    )
    return theme(no_mouse(command))


def has_terminal() -> bool:
    """Whether a person sits at a terminal: keys come from stdin, and textual draws on stderr."""
    import sys

    return sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()


def can_draw() -> bool:
    """Whether the terminal is one that a screen can be drawn on; TERM = dumb, or none, takes plain
    lines only.
    """
    return has_terminal() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def show_screen(screen: Callable[[], int]) -> int:
    """Run a screen in a process of its own, so that whatever ends it leaves the terminal usable;
    its exit code.
    """
    from guardrail.tui.terminal.screen_process import in_child

    return in_child(screen)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around the import of a large library: what it makes stays, and looking it through for garbage
    takes a tenth of the time. It is not looked through later either.
    """
    import gc

    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def the_run(spec: str | None, root: str) -> RunDirectory:
    """RUN on a command line: a path, NAME, NAME/DATE-NN, the beginning of one, or nothing for the
    newest.
    """
    from guardrail.rundir.run_directory import find_run

    return find_run(spec, root)


def root_folder() -> str:
    """The folder of all runs where no option names one."""
    return os.environ.get("GUARDRAIL_ROOT") or "runs"


def complete_run(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of runs for shell completion, the newest first."""
    from guardrail.rundir.run_directory import list_runs

    root = context.params.get("root") or root_folder()
    return [run.name for run in list_runs(root) if run.name.startswith(incomplete)]


def complete_configuration(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete the names of files."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


class FirstNameOption(click.Option):
    """An option whose help shows its first name alone; the others are its old names."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


class FiniteFloat(click.FloatRange):
    """A number that is neither NaN nor infinite: every comparison with NaN is false, so a range
    lets it pass.
    """

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        import math

        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def given_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """SIGNAL=NAME of --column -> signal and name. Raises click.UsageError."""
    given = {}
    for text in columns:
        signal, equals, name = text.partition("=")
        if not equals or not signal or not name:
            raise click.UsageError(
                f"--column {escape_text(text, 160)}: expected SIGNAL=NAME, e.g. loss=train/ce"
            )
        given[signal] = name
    return given


def print_json(value: Any) -> None:
    """One JSON document on stdout; records, paths and numbers that JSON lacks included."""
    import msgspec

    from guardrail.core.files import encode_json

    click.echo(msgspec.json.format(encode_json(value), indent=2).decode())
