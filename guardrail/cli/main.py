"""The `guardrail` command. Subcommands are imported when they are used, and their bodies import
what they run.
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

# name -> what the list of `guardrail --help` says, so that it needs no import. The command stands
# in guardrail/cli/NAME.py under the name `command`.
COMMANDS = {
    "init": "Write a commented config.toml.",
    "launch": "Start a training run and watch it.",
    "attach": "Watch a run, running or ended.",
    "runs": "List the runs; in a terminal, choose one to watch.",
    "view": "Look at a recorded log, or at a run directory.",
    "ctl": "Send a command to a run and wait for its answer.",
    "report": "Say what happened in a run.",
    "backtest": "Say what the guard would have done about recorded runs.",
    "tune": "Propose a [guard] section for recorded runs.",
    "replay": "Make steps again and compare every number.",
    "verify": "Check the hashes of a checkpoint.",
    "doctor": "Say what this machine can do, and what of a configuration it cannot.",
    "completion": "Print the completion script of a shell.",
}
COMPLETION_VARIABLE = "_GUARDRAIL_COMPLETE"  # click reads it: the shell asks for completions


class LazyGroup(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"guardrail.cli.{name}").command
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

    Exit codes: 0 finished, 2 bad usage or configuration, 3 halted by the guard, 4 the training
    processes failed or the end could not be saved, 5 a check did not hold, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        from guardrail.cli.common import root_folder
        from guardrail.cli.next_steps import next_steps

        steps = list(next_steps(root_folder()))
        width = max(len(words) for words, _ in steps)
        for words, purpose in steps:
            click.echo(f"{words:<{width}}   {purpose}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the one place that turns an error into a message on stderr and an exit
    code.
    """
    _print_anything()
    try:
        _refuse_impossible(sys.argv[1:] if arguments is None else arguments)
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
        # An override without its --set is an argument too many, which click repeats.
        print(escape_lines(hide_assignments(shown.getvalue().rstrip("\n")), 400), file=sys.stderr)
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        return ExitCode.INTERRUPTED
    except SystemExit:
        # How click ends when the reader of our output has gone: `guardrail runs | head` is no
        # failure.
        return ExitCode.FINISHED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"guardrail: {escape_lines(f'{place}{error.strerror or error}')}", file=sys.stderr)
        return ExitCode.USAGE


def _print_anything() -> None:
    """A name that is no UTF-8, or a terminal that knows ASCII alone, must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse_impossible(arguments: Sequence[str]) -> None:
    """NUL and lone surrogates: no file, run or setting can have them, and the system refuses them
    in its own ways.
    """
    for argument in arguments:
        try:
            possible = b"\0" not in os.fsencode(argument)
        except UnicodeEncodeError:
            possible = False
        if not possible:
            raise UsageError(
                f"{escape_text(argument, 160)}: expected an argument of characters that a file name may have"
            )
