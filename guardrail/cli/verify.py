"""guardrail verify: check a checkpoint against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from guardrail.cli.common import json_option, open_run, print_json, root_option


@click.command()
@click.argument("target", metavar="RUN|CHECKPOINT")
@click.option(
    "--fingerprint",
    is_flag=True,
    help="Print one SHA-256 of all parameters. The number of shards does not change this SHA-256.",
)
@json_option
@root_option
def command(target: str, fingerprint: bool, as_json: bool, root: str) -> None:
    """Check the size and the SHA-256 of every file of a checkpoint. RUN stands for its newest checkpoint.

    Exit code 5: a check failed. The file is named on stderr.
    """
    from guardrail.rundir import verification

    folder = find_checkpoint(target, root)
    verification.verify(folder)
    answer: dict[str, Any] = {"checkpoint": str(folder), "valid": True}
    if fingerprint:
        answer["fingerprint"] = verification.fingerprint(folder)
    if as_json:
        print_json(answer)
    elif fingerprint:
        click.echo(answer["fingerprint"])
    else:
        click.echo(f"{folder}: every hash holds")


def find_checkpoint(target: str, root: str) -> Path:
    """Return the checkpoint folder that `target` is, or the newest one of the run that it names.

    Raises:
        CheckFailed: the run has no checkpoint.
    """
    from guardrail.core.errors import CheckFailed
    from guardrail.rundir.checkpoint_folders import checkpoint_dirs

    folder = Path(target)
    if folder.name.startswith("step-") and folder.is_dir():
        return folder
    run = open_run(target, root)
    folders = checkpoint_dirs(run.checkpoints)
    if not folders:
        raise CheckFailed(f"{run.name} has no checkpoint")
    return folders[0]
