"""guardrail report: what happened in a run."""

from __future__ import annotations

import click

from guardrail.cli.common import complete_run, json_option, print_json, root_option, the_run

FORMATS = ("terminal", "markdown", "html")


@click.command(short_help="Say what happened in a run.")
@click.argument("run", required=False, shell_complete=complete_run)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="How; by default as the name of -o ends."
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write there instead of stdout: .md, .html, or anything else.",
)
@json_option
@click.option(
    "--quarantine", is_flag=True, help="Only the sample ids that were left out, one a line."
)
@root_option
def command(
    run: str | None,
    form: str | None,
    output: str | None,
    as_json: bool,
    quarantine: bool,
    root: str,
) -> None:
    """Say what happened in a run: of each incident what was seen, decided and done, what it cost,
    its cause, its outcome and its documents; then commands, checkpoints and restarts.

    HTML is one file with the curves in it. --quarantine prints the format that `[data] quarantine =
    "FILE"` reads.
    """
    from guardrail.report import output as reports
    from guardrail.report.quarantine import quarantine_lines

    if as_json and quarantine:
        raise click.UsageError("--json and --quarantine are two answers; ask for one")
    if form is not None and (as_json or quarantine):
        raise click.UsageError("--format does not go with --json or --quarantine")
    found = the_run(run, root)
    if as_json and output is None:
        print_json(reports.as_dict(found))
        return
    if quarantine:
        text = "".join(f"{line}\n" for line in quarantine_lines(found))
    elif as_json:
        import msgspec

        text = (
            msgspec.json.format(msgspec.json.encode(reports.as_dict(found)), indent=2).decode()
            + "\n"
        )
    else:
        text = reports.written(found, form or _form(output))
    if output is None:
        click.echo(text, nl=False)
    else:
        reports.save(output, text)


def _form(output: str | None) -> str:
    ending = (output or "").rsplit(".", 1)[-1].lower()
    return {"md": "markdown", "markdown": "markdown", "html": "html", "htm": "html"}.get(
        ending, "terminal"
    )
