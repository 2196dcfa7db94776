"""guardrail ctl: send one command to a run, and print the answer from its journal.

The commands, their help and their completion come from `guardrail.decide.control_commands`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import click

from guardrail.cli.common import (
    FiniteFloat,
    complete_run,
    json_option,
    open_run,
    print_json,
    root_option,
)

if TYPE_CHECKING:
    from guardrail.operate.preview import Preview
    from guardrail.rundir.run_directory import RunDirectory

LIST = "{commands}"  # where the help has the list of commands


class CtlCommand(click.Command):
    """A command whose help lists the commands to a run. The list is loaded only to print it."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        template = inspect.cleandoc(self.help or "")
        self.help = template.replace(LIST, command_list())
        super().format_help_text(ctx, formatter)
        self.help = template


def command_list() -> str:
    """Return a line for each command: its name, its argument and what it does."""
    from guardrail.decide.control_commands.registry import COMMANDS

    rows = [(f"{kind.name} {kind.argument.metavar}".rstrip(), kind.help) for kind in COMMANDS]
    width = max(len(usage) for usage, _ in rows)
    return "\n".join(f"{usage:<{width}}  {text}" for usage, text in rows)


def complete_action(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of commands for shell completion."""
    from guardrail.decide.control_commands.registry import command_names

    return [name for name in command_names() if name.startswith(incomplete)]


def complete_value(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the words that the command takes, for shell completion."""
    from guardrail.decide.control_commands.arguments import Word
    from guardrail.decide.control_commands.registry import find_command

    kind = find_command(context.params.get("action"))
    if kind is None or not isinstance(kind.argument, Word):
        return []
    return [word for word in kind.argument.words if word.startswith(incomplete)]


@click.command(cls=CtlCommand)
@click.argument("run", shell_complete=complete_run)
@click.argument("action", metavar="ACTION", shell_complete=complete_action)
@click.argument("value", required=False, shell_complete=complete_value)
@click.option(
    "--wait",
    "seconds",
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    type=FiniteFloat(min=0.0),
    help="0: do not wait.",
)
@click.option(
    "--at-step", default=0, metavar="STEP", help="Take effect at the end of this step; 0: at once."
)
@click.option(
    "--question",
    type=click.IntRange(min=1),
    metavar="N",
    help="Answer the question of journal line N.",
)
@click.option("--preview", is_flag=True, help="Print what it would do and cost now; send nothing.")
@json_option
@root_option
def command(
    run: str,
    action: str,
    value: str | None,
    seconds: float,
    at_step: int,
    question: int | None,
    preview: bool,
    as_json: bool,
    root: str,
) -> int:
    """Send a command to a run and wait until it has taken effect.

    \b
    {commands}

    `ctl` prints what took effect and at which step. Exit code 2: the run refused the command, is
    not running, or did not answer. --preview prints what the command would restore, what would be
    lost and what would be skipped, and sends nothing. `answer --preview` shows this for each
    answer.

    A command belongs to the question that is open when you give the command. The run refuses a
    command that arrives while another question is open. `answer 0`, `1` and `2` mean accept,
    continue and stop.
    """
    from guardrail.core.errors import ExitCode
    from guardrail.decide.control_commands.answer import Answer
    from guardrail.operate import control

    if question is not None and action != Answer.name:
        raise click.UsageError(f"--question needs the command {Answer.name}, not {action}")
    found = open_run(run, root)
    if preview:
        return _preview(found, action, value, question, as_json=as_json)
    wanted = control.bind_to_present(
        found, control.parse_command(action, value, at_step=at_step), question
    )
    answer = control.send_and_wait(found, wanted, seconds=seconds)
    if as_json:
        print_json(control.answer_as_dict(answer))
    else:
        click.echo(control.format_answer(answer))
    return ExitCode.FINISHED


def _preview(
    run: RunDirectory, action: str, value: str | None, question: int | None, *, as_json: bool
) -> int:
    """Print what the command would do; of `answer` without a value, what each answer would do."""
    import msgspec

    from guardrail.core.errors import ExitCode
    from guardrail.decide.control_commands.answer import Answer
    from guardrail.decide.questions import CHOICES, open_question
    from guardrail.operate import control
    from guardrail.operate.preview import preview_in_run

    values = [value]
    if action == Answer.name and value is None:
        values = list(CHOICES)
        if open_question(run.events()) is None:
            values = values[:1]  # one refusal is enough
    previews = []
    for one in values:
        wanted = msgspec.structs.replace(control.parse_command(action, one), question=question)
        previews.append(preview_in_run(run, wanted))
    if as_json:
        print_json(previews if len(previews) > 1 else previews[0])
    else:
        _print_previews(previews)
    if not all(one.possible for one in previews):
        return ExitCode.USAGE
    return ExitCode.FINISHED


def _print_previews(previews: list[Preview]) -> None:
    from guardrail.decide.questions import CHOICES

    if len(previews) == 1:
        click.echo(previews[0].sentence())
        return
    for choice, one in zip(CHOICES, previews, strict=True):
        click.echo(f"{choice}: {one.sentence()}")
