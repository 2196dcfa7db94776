"""The `guardrail` command.

A subcommand is imported when it is used, and its body imports what it runs.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

import click

from guardrail.core.errors import ExitCode, GuardrailError, UsageError, hide_assignments
from guardrail.core.text import escape_lines, escape_text

# name -> its line in `guardrail --help`, which so needs no import. The command is `command` in
# guardrail/cli/NAME.py.
COMMANDS = {
    "init": "Write a commented config.toml.",
    "launch": "Start a training run and watch it.",
    "attach": "Watch a run that is running or has ended.",
    "runs": "List the runs; in a terminal, choose a run to watch.",
    "view": "Show a recorded log or a run directory on the screen.",
    "ctl": "Send a command to a run and wait for its answer.",
    "report": "Print what happened in a run.",
    "backtest": "Print what the guard would have done in recorded runs.",
    "tune": "Print detection thresholds that fit recorded runs.",
    "replay": "Run steps again and compare every number.",
    "verify": "Check the hashes of a checkpoint.",
    "doctor": "Check this machine, and a configuration on it.",
    "completion": "Print the completion script of a shell.",
}
COMPLETION_VARIABLE = "_GUARDRAIL_COMPLETE"  # click reads it: the shell asks for completions


class LazyGroup(click.Group):
    """Imports a subcommand when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"guardrail.cli.{name}").command
        command.short_help = COMMANDS[name]
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
            raise click.UsageError(
                f"no such command: {escape_text(args[0], 160)}\n  hint: {hint}", context
            )
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="guardrail", message="%(version)s")
@click.pass_context
def guardrail(context: click.Context) -> None:
    """Terminal monitor and stability controller for PyTorch language-model training.

    \b
    guardrail init                               write a commented config.toml
    guardrail launch config.toml                 start a run and watch it
    guardrail attach                             watch the newest run again

    Exit codes: 0 finished, 2 wrong usage or configuration, 3 halted by the guard, 4 the training
    processes failed or the end could not be saved, 5 a check failed, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        from guardrail.cli.common import root_folder
        from guardrail.cli.next_steps import suggest_commands

        steps = list(suggest_commands(root_folder()))
        width = max(len(words) for words, _ in steps)
        for words, purpose in steps:
            click.echo(f"{words:<{width}}   {purpose}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code.

    Every error becomes a message on stderr and an exit code here.
    """
    _escape_unprintable()
    try:
        _check_arguments(sys.argv[1:] if arguments is None else arguments)
        result = guardrail.main(
            args=arguments,
            prog_name="guardrail",
            complete_var=COMPLETION_VARIABLE,
            standalone_mode=False,
        )
        return int(result) if isinstance(result, int) else ExitCode.FINISHED
    except GuardrailError as error:
        print(f"guardrail: {escape_lines(str(error))}", file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        # click writes each choice of a missing argument on a line with a tab.
        text = shown.getvalue().rstrip("\n").replace("\n\t", " ")
        # click repeats an override without its --set as an unexpected argument.
        print(escape_lines(hide_assignments(text), 400), file=sys.stderr)
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        return ExitCode.INTERRUPTED
    except SystemExit:
        # click ends so when the reader of the output has closed it: `guardrail runs | head` is no
        # failure.
        return ExitCode.FINISHED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        message = str(error.strerror or error)
        if error.filename is not None:
            message = f"{error.filename}: {message}"
        print(f"guardrail: {escape_lines(message)}", file=sys.stderr)
        return ExitCode.USAGE


def _escape_unprintable() -> None:
    """Make stdout and stderr escape what they cannot encode.

    A file name that is not UTF-8, or an ASCII terminal, must not end a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse NUL and lone surrogates, which no file, run or setting can have. Raises UsageError."""
    for argument in arguments:
        try:
            is_possible = b"\0" not in os.fsencode(argument)
        except UnicodeEncodeError:
            is_possible = False
        if not is_possible:
            raise UsageError(
                f"{escape_text(argument, 160)}: expected an argument of characters that a file "
                "name may have"
            )
