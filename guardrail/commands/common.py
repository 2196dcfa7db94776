"""Options and small output helpers that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from guardrail.rundir import RunDirectory

root_option = click.option(
    "--root",
    default="runs",
    show_default=True,
    envvar="GUARDRAIL_ROOT",
    metavar="DIR",
    help="Folder of all runs ($GUARDRAIL_ROOT).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for a script.")


def the_run(spec: str | None, root: str) -> RunDirectory:
    """RUN on a command line: a path, NAME, NAME/DATE-NN, the beginning of one, or nothing for the newest."""
    from guardrail.rundir import find_run

    return find_run(spec, root)


def given_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """SIGNAL=NAME of --column -> signal and name. Raises click.UsageError."""
    given = {}
    for text in columns:
        signal, equals, name = text.partition("=")
        if not equals or not signal or not name:
            raise click.UsageError(f"--column {text!r}: expected SIGNAL=NAME, e.g. loss=train/ce")
        given[signal] = name
    return given


def print_json(value: Any) -> None:
    """One JSON document on stdout; records, paths and numbers that JSON lacks included."""
    import msgspec

    from guardrail.files import encode_json

    click.echo(msgspec.json.format(encode_json(value), indent=2).decode())
