"""The report of a run in every format: JSON, terminal text, Markdown, HTML; and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import RunDirectoryError
from guardrail.core.files import encode_json
from guardrail.report.build import build
from guardrail.rundir.run_directory import RunDirectory


def as_dict(run: RunDirectory) -> dict[str, Any]:
    """The report as JSON-able data; NaN and infinities are strings, as in the journal."""
    return msgspec.json.decode(encode_json(build(run)))


def text(run: RunDirectory) -> str:
    """The report for a person, plain text with the loss drawn in it."""
    from guardrail.report.render_text import tell
    from guardrail.report.text_chart import sketch

    report = build(run)
    return tell(report, drawn=sketch(run, report.incidents))


def written(run: RunDirectory, form: str) -> str:
    """The report as "terminal" (plain text), "markdown" or "html" (one file, with curves)."""
    if form == "terminal":
        return text(run) + "\n"
    from guardrail.report import render_html as pages
    from guardrail.report import svg_curves as curves
    from guardrail.report.outline import outline

    report = build(run)
    sections = list(outline(report))
    if form == "markdown":
        return pages.markdown(sections)
    return pages.page(sections, curves.draw(run, run.events(), report.incidents))


def save(path: str, content: str) -> None:
    """Write a report. Raises RunDirectoryError: it cannot be written there."""
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from error
