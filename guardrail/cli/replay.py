"""guardrail replay: the same steps once more, and whether every number is the same."""

from __future__ import annotations

import click

from guardrail.cli.common import complete_run, json_option, print_json, root_option, the_run


@click.command(short_help="Run a stretch again and compare every number.")
@click.argument("run", required=False, shell_complete=complete_run)
@click.option(
    "--incident",
    type=click.IntRange(min=1),
    metavar="N",
    help="From the checkpoint before this incident.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the folder of the replay, a run directory, and print its path.",
)
@json_option
@root_option
def command(run: str | None, incident: int | None, keep: bool, as_json: bool, root: str) -> int:
    """Run a stretch again with the journal's decisions, and say whether every number is the same as
    in metrics.bin.

    Without --incident it begins at step 0; with it, at the newest checkpoint from before that
    incident, and ends where the incident was over. Same ranks and devices as the run had; its
    directory is only read.

    Exit code 5 if a number differs: the first such step and column are named.
    """
    import sys
    import time

    from guardrail.core.errors import ExitCode
    from guardrail.operate import replay as replaying

    shown = [0.0, -1.0]  # when progress was last told, and at which step
    live = sys.stderr.isatty()

    def tell(done: int, of: int) -> None:
        now = time.monotonic()
        if done != shown[1] and now - shown[0] >= (0.0 if live else 5.0):
            shown[:] = [now, done]
            click.echo(
                f"{chr(13) if live else ''}replayed {done:,} of {of:,} steps", err=True, nl=not live
            )

    found = the_run(run, root)
    for remark in replaying.remarks(found):
        click.echo(f"note: {remark}; numbers may differ", err=True)
    outcome = replaying.replay(found, incident=incident, keep=keep, tell=tell)
    if live:
        click.echo("", err=True)
    if as_json:
        print_json(outcome)
    else:
        click.echo(outcome.sentence())
        if keep:
            click.echo(outcome.scratch)
    return ExitCode.FINISHED if outcome.same else ExitCode.CHECK_FAILED
