"""guardrail report: print what happened in a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from guardrail.cli.common import (
    complete_run,
    json_option,
    open_run,
    print_json,
    root_folder,
    root_option,
)

if TYPE_CHECKING:
    from guardrail.rundir.run_directory import RunDirectory

FORMATS = ("terminal", "markdown", "html")
_PARTS = ("--incident", "--quarantine", "--commands", "--json")  # each is a report of its own


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@click.option(
    "--incident",
    type=int,
    metavar="N",
    help="Print the details of incident N: signals, decisions, documents, tokens.",
)
@click.option("--excerpts", is_flag=True, help="With --incident: also print text of the documents.")
@click.option("--chart", is_flag=True, help="Add the loss curve.")
@click.option("--commands", is_flag=True, help="Print the commands of users, and the notes.")
@click.option(
    "--quarantine", is_flag=True, help="Print the ids of the skipped samples, one per line."
)
@json_option
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Default: by the ending of -o FILE."
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write to FILE instead of stdout: .md, .html, or anything else.",
)
@root_option
def command(
    run: str | None,
    incident: int | None,
    excerpts: bool,
    chart: bool,
    commands: bool,
    quarantine: bool,
    as_json: bool,
    form: str | None,
    output: str | None,
    root: str,
) -> None:
    """Print what happened in a run: incidents with cause, action and cost, checkpoints, and
    commands that you may want to run next.

    Markdown and HTML hold the details of every incident; HTML is one file with the curves in it.
    --quarantine prints the format that `[data] quarantine = "FILE"` reads.
    """
    flags = (incident is not None, quarantine, commands, as_json)
    part = "".join(_only_one([name for name, given in zip(_PARTS, flags, strict=True) if given]))
    shape = form or _find_form(output)
    _refuse_others(part, form=form, shape=shape, excerpts=excerpts, chart=chart)
    found = open_run(run, root)
    if as_json and output is None:
        from guardrail.report.output import report_as_dict

        print_json(report_as_dict(found))
        return
    if part:
        text = _render_part(found, part, incident, excerpts)
    else:
        from guardrail.report.output import render_report

        text = render_report(found, shape, spec=_find_spec(found, run), chart=chart)
    if output is None:
        click.echo(text, nl=False)
    else:
        from guardrail.report.output import save_report

        save_report(output, text)


def _only_one(parts: list[str]) -> list[str]:
    if len(parts) > 1:
        raise click.UsageError(f"{parts[0]} and {parts[1]} exclude each other; give one of them")
    return parts


def _refuse_others(part: str, *, form: str | None, shape: str, excerpts: bool, chart: bool) -> None:
    """Raise click.UsageError where options do not go together."""
    if part and form is not None:
        raise click.UsageError(f"--format does not go with {part}.")
    if excerpts and part != "--incident":
        raise click.UsageError("--excerpts needs --incident N.")
    if chart and part:
        raise click.UsageError(f"--chart does not go with {part}.")
    if chart and shape != "terminal":
        raise click.UsageError("--chart is for the terminal; HTML has the curves anyway.")


def _render_part(found: RunDirectory, part: str, incident: int | None, excerpts: bool) -> str:
    """Return the text of a report that is not the summary."""
    from guardrail.report import output as reports

    if part == "--incident":
        return f"{reports.incident_text(found, incident or 0, excerpts=excerpts)}\n"
    if part == "--commands":
        return f"{reports.commands_text(found)}\n"
    if part == "--quarantine":
        from guardrail.report.quarantine import quarantine_lines

        return "".join(f"{line}\n" for line in quarantine_lines(found))
    import msgspec

    encoded = msgspec.json.encode(reports.report_as_dict(found))
    return f"{msgspec.json.format(encoded, indent=2).decode()}\n"


def _find_spec(found: RunDirectory, typed: str | None) -> str:
    """Return what names the run on a command line.

    That is its name where this is enough, else the path that was typed, else its path.
    """
    usual = root_folder()
    path = os.path.abspath(found.path)
    if os.path.abspath(os.path.join(usual, found.name)) == path:
        return found.name
    if typed and os.path.exists(typed):
        return typed
    below = os.path.relpath(path)
    return path if below.startswith("..") else below


def _find_form(output: str | None) -> str:
    ending = (output or "").rsplit(".", 1)[-1].lower()
    return {"md": "markdown", "markdown": "markdown", "html": "html", "htm": "html"}.get(
        ending, "terminal"
    )
