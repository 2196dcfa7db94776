"""guardrail replay: run steps again, and check that every number is the same."""

from __future__ import annotations

import click

from guardrail.cli.common import complete_run, json_option, open_run, print_json, root_option


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@click.option(
    "--incident",
    type=click.IntRange(min=1),
    metavar="N",
    help="Begin at the checkpoint before this incident.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the folder of the replay, a run directory, and print its path.",
)
@json_option
@root_option
def command(run: str | None, incident: int | None, keep: bool, as_json: bool, root: str) -> int:
    """Run steps again with the decisions of the journal, and compare every number with metrics.bin.

    Without --incident the replay begins at step 0. With --incident N the replay begins at the
    newest checkpoint from before incident N, and ends where that incident ended. A replay needs as
    many ranks as the run, on the same kind of device. A replay only reads the run directory.

    Exit code 5: a number differs. The first such step and column are printed.
    """
    import sys
    import time

    from guardrail.core.errors import ExitCode
    from guardrail.operate.replay import replay_run
    from guardrail.operate.replay_plan import machine_remarks

    shown = [0.0, -1.0]  # when progress was last printed, and at which step
    live = sys.stderr.isatty()

    def report(done: int, of: int) -> None:
        now = time.monotonic()
        if done != shown[1] and now - shown[0] >= (0.0 if live else 5.0):
            shown[:] = [now, done]
            start = "\r" if live else ""
            click.echo(f"{start}replayed {done:,} of {of:,} steps", err=True, nl=not live)

    found = open_run(run, root)
    for remark in machine_remarks(found):
        click.echo(f"note: {remark}; numbers may differ", err=True)
    outcome = replay_run(found, incident=incident, keep=keep, report=report)
    if live:
        click.echo("", err=True)
    if as_json:
        print_json(outcome)
    else:
        click.echo(outcome.sentence())
        if keep:
            click.echo(outcome.scratch)
    return ExitCode.FINISHED if outcome.same else ExitCode.CHECK_FAILED
