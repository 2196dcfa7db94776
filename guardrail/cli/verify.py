"""guardrail verify: does a checkpoint hold what its manifest says?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from guardrail.cli.common import json_option, print_json, root_option, the_run


@click.command(short_help="Check the hashes of a checkpoint.")
@click.argument("target", metavar="RUN|CHECKPOINT")
@click.option(
    "--fingerprint",
    is_flag=True,
    help="Print one SHA-256 over all parameters, the same for any sharding.",
)
@json_option
@root_option
def command(target: str, fingerprint: bool, as_json: bool, root: str) -> None:
    """Check sizes and SHA-256 of every file of a checkpoint; of a run, its newest one.

    Exit code 5, and one sentence that names the file, when a check does not hold.
    """
    from guardrail.rundir import manifest

    folder = checkpoint_of(target, root)
    manifest.verify(folder)
    answer: dict[str, Any] = {"checkpoint": str(folder), "valid": True}
    if fingerprint:
        answer["fingerprint"] = manifest.fingerprint(folder)
    if as_json:
        print_json(answer)
    elif fingerprint:
        click.echo(answer["fingerprint"])
    else:
        click.echo(f"{folder}: every hash holds")


def checkpoint_of(target: str, root: str) -> Path:
    """A checkpoint folder itself, or the newest one of a run. Raises CheckFailed if a run has
    none.
    """
    from guardrail.core.errors import CheckFailed
    from guardrail.rundir import manifest

    folder = Path(target)
    if folder.name.startswith("step-") and folder.is_dir():
        return folder
    run = the_run(target, root)
    folders = manifest.checkpoint_dirs(run.checkpoints)
    if not folders:
        raise CheckFailed(f"{run.name} has no checkpoint")
    return folders[0]
