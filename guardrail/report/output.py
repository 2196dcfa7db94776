"""The report of a run in every format: JSON, plain text, Markdown, HTML. Also writes it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import RunDirectoryError, UsageError
from guardrail.core.files import encode_json
from guardrail.report.build import build_report
from guardrail.rundir.run_directory import RunDirectory


def report_as_dict(run: RunDirectory) -> dict[str, Any]:
    """Return the report as data for JSON. NaN and infinities are strings, as in the journal."""
    return msgspec.json.decode(encode_json(build_report(run)))


def summary_text(run: RunDirectory, *, spec: str = "", chart: bool = False) -> str:
    """Return the summary as plain text, without a line end after it.

    Args:
        spec: what names the run on a command line, by default its name.
        chart: add the loss curve.
    """
    from guardrail.report.render_text import render_summary
    from guardrail.report.text_chart import draw_chart

    report = build_report(run)
    curve = []
    if chart:
        curve = draw_chart(run, report.incidents)
    return render_summary(report, spec=spec or report.run, chart=curve)


def incident_text(run: RunDirectory, number: int, *, excerpts: bool = False) -> str:
    """Return everything about one incident as plain text. UsageError if there is no such incident."""
    from guardrail.report.incident_details import find_incident
    from guardrail.report.render_text import render_incident

    report = build_report(run)
    incident = find_incident(report.incidents, number)
    if incident is None:
        known = [one.number for one in report.incidents if one.number]
        there = "no incidents"
        if known:
            there = f"1 to {max(known)}"
        raise UsageError(f"--incident {number}: {report.run} has {there}.")
    return render_incident(report, incident, excerpts=excerpts)


def commands_text(run: RunDirectory) -> str:
    """Return commands, their effects, and notes as plain text."""
    from guardrail.report.render_text import render_commands

    return render_commands(build_report(run))


def render_report(run: RunDirectory, form: str, *, spec: str = "", chart: bool = False) -> str:
    """Return the report as "terminal" (plain text), "markdown" or "html" (one file, with curves)."""
    if form == "terminal":
        return summary_text(run, spec=spec, chart=chart) + "\n"
    from guardrail.report import render_html as pages
    from guardrail.report import svg_curves as curves
    from guardrail.report.outline import outline_report

    report = build_report(run)
    sections = list(outline_report(report, spec or report.run))
    if form == "markdown":
        return pages.render_markdown(sections)
    return pages.render_page(sections, curves.draw_curves(run, run.events(), report.incidents))


def save_report(path: str, content: str) -> None:
    """Write a report. Raises RunDirectoryError: it cannot be written there."""
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from error
