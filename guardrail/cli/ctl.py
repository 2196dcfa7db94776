"""guardrail ctl: one command to a run, and the answer from its journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from guardrail.cli.common import (
    FiniteFloat,
    complete_run,
    json_option,
    print_json,
    root_option,
    the_run,
)

if TYPE_CHECKING:
    from guardrail.rundir.run_directory import RunDirectory


@click.command(short_help="Send a command to a run and wait for its answer.")
@click.argument("run", shell_complete=complete_run)
@click.argument("action", metavar="ACTION")
@click.argument("value", required=False)
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
@click.option(
    "--preview", is_flag=True, help="Say what it would do and cost now, and send nothing."
)
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
    pause | resume           Pause after the current step; continue.
    rollback [STEP]          Restore a snapshot or checkpoint; without STEP the newest good one.
    undo [SEQ]               Undo the guard's decision of journal line SEQ; without SEQ its newest.
    accept                   Accept the run as it is while an incident is open. States count as good again.
    skip N                   Skip the next N batches.
    lr FACTOR                Multiply the scheduled learning rate.
    shrink-embedding FACTOR  Multiply the embedding gradients, 0 < FACTOR <= 1.
    checkpoint               Write a checkpoint now.
    mode MODE                Change who decides: auto, ask, advise or off.
    stop                     Save a checkpoint and end.
    answer WORD              Answer the guard's question: accept its proposal, continue, or stop.

    Prints what took effect and at which step. Exit code 2: the run refused the command, is not
    running, or did not answer. --preview prints what the command would restore, what would be lost
    and what would be skipped, and sends nothing. `answer --preview` shows this for each answer.

    A command belongs to the question that is open when you give it. If another question is open
    when it reaches the run, the run refuses it. `answer 0`, `1` and `2` mean accept, continue and
    stop.
    """
    from guardrail.core.errors import ExitCode
    from guardrail.operate import control

    if question is not None and action != "answer":
        raise click.UsageError("--question goes with answer alone")
    found = the_run(run, root)
    if preview:
        return _preview(found, action, value, question, as_json=as_json)
    wanted = control.bound(found, control.parse(action, value, at_step=at_step), question)
    answer = control.send(found, wanted, seconds=seconds)
    if as_json:
        print_json(control.as_dict(answer))
    else:
        click.echo(control.sentence(answer))
    return ExitCode.FINISHED


def _preview(
    run: RunDirectory, action: str, value: str | None, question: int | None, *, as_json: bool
) -> int:
    """What the command would do; of an answer without a value, what each of them would."""
    import msgspec

    from guardrail.core.errors import ExitCode
    from guardrail.decide.questions import CHOICES, open_question
    from guardrail.operate import control
    from guardrail.operate.preview import foresee

    values = [value]
    if action == "answer" and value is None:
        values = list(CHOICES) if open_question(run.events()) is not None else [CHOICES[0]]
    wanted = [control.parse(action, one) for one in values]
    foreseen = [foresee(run, msgspec.structs.replace(one, question=question)) for one in wanted]
    if as_json:
        print_json(foreseen if len(foreseen) > 1 else foreseen[0])
    else:
        for at, one in enumerate(foreseen):
            click.echo(f"{CHOICES[at]}: {one.sentence()}" if len(foreseen) > 1 else one.sentence())
    return ExitCode.FINISHED if all(one.possible for one in foreseen) else ExitCode.USAGE
