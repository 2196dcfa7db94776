"""The report as Markdown, and as one HTML file that loads nothing: no script, no font, no address.

Text from outside (names of documents, excerpts, messages) stays text, whatever it contains.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence

from guardrail.report.incident_details import Table
from guardrail.report.outline import Section

# ASCII punctuation with a meaning in CommonMark (section 2.4 allows a backslash before each), and
# the characters of HTML, which Markdown does not escape.
_SPECIAL = re.compile(r"([\\`*_\[\]#+!|~>$]|^-)")

_STYLE = """
:root { color-scheme: light dark; --text: #1d1f23; --dim: #667; --back: #fff; --line: #d5d8de;
  --here: #1f5fbf; --gone: #b3b8c2; --bad: #c62828; --band: rgb(31 95 191 / .14); --eval: #2e7d32; --undo: #8e6bbf; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e5e9; --dim: #98a; --back: #15171a; --line: #33373e;
  --here: #7fb2ff; --gone: #565c66; --bad: #ff7b72; --band: rgb(127 178 255 / .16); --eval: #7ccf83;
  --undo: #b79be8; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; border-bottom: 1px solid var(--line); margin-top: 2rem; }
h3 { font-size: 1rem; margin-top: 1.5rem; } ul { padding-left: 1.2rem; } li { margin: .1rem 0; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .1rem .8rem .1rem 0; }
th, figcaption, .label { color: var(--dim); font-weight: normal; }
figure { margin: 1rem 0; } .number { text-align: right; }
code { font: .9em ui-monospace, monospace; }
blockquote { margin: .1rem 0 .1rem 1rem; font: .85em ui-monospace, monospace; white-space: pre-wrap; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--dim); } polyline { fill: none; }
.grid { stroke: var(--line); } .here { stroke: var(--here); stroke-width: 1.4; } .band { fill: var(--band); }
.gone { stroke: var(--gone); stroke-dasharray: 3 3; } .tried { fill: var(--bad); } .eval { fill: var(--eval); }
.nan { fill: none; stroke: var(--bad); } .heading { stroke: var(--eval); stroke-dasharray: 6 3; }
.mark { stroke: var(--bad); stroke-dasharray: 2 4; } .undo { stroke: var(--undo); }
""".strip()
LEGEND = (
    "line: applied steps; dashed grey: discarded steps; area: from the normal value to the limit; red: rejected tries "
    "(hollow: not finite); green: held-out loss, and dashed the loss trend before an incident; dashed upright: the "
    "step that a rollback or an undo restored"
)


def render_markdown(sections: Iterable[Section]) -> str:
    """Return CommonMark, with tables as GitHub writes them."""
    lines: list[str] = []
    for section in sections:
        lines += [f"{'#' * section.level} {_escape_markdown(section.title)}", ""]
        for paragraph in section.paragraphs:
            lines += [_escape_markdown(paragraph), ""]
        for table in section.tables:
            lines += [*_render_markdown_table(table), ""]
        if section.items:
            lines += [*(f"- {_escape_markdown(item)}" for item in section.items), ""]
        if section.commands:
            lines += ["Next:", ""]
            lines += [
                f"- {_escape_code(command)}: {_escape_markdown(what)}"
                for command, what in section.commands
            ]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _render_markdown_table(table: Table) -> Iterator[str]:
    if table.title:
        yield from (f"**{_escape_markdown(table.title)}**", "")
    yield _render_markdown_row(table.heads)
    rules = ["---"] * len(table.heads)
    for column in table.right:
        rules[column] = "--:"
    yield _render_markdown_row(rules).replace("\\", "")
    yield from map(_render_markdown_row, table.rows)
    if table.rest:
        yield from ("", _escape_markdown(table.rest))
    for name, text in table.excerpts:
        yield from ("", f"{_escape_markdown(name)}:", "", f"> {_escape_markdown(text)}")


def _render_markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escape_markdown, cells))} |"


def _escape_code(text: str) -> str:
    """Return a command as inline code; as plain text if a code span cannot hold it."""
    if re.search(r"[`<&\[\]]", text):
        return _escape_markdown(text)
    return f"`{text}`"


def _escape_markdown(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")


def render_page(sections: Sequence[Section], curves: Iterable[tuple[str, str]]) -> str:
    """Return one HTML file.

    Args:
        curves: (name, SVG) as `guardrail.report.svg_curves` draws them; they stand below the
        summary.
    """
    summary, *others = sections
    body = [
        *_render_section(summary),
        *_render_figures(curves),
        *(line for section in others for line in _render_section(section)),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # Whatever text gets in here, nothing is fetched and nothing runs.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(summary.title)}</title>",
            f"<style>\n{_STYLE}\n</style></head><body>",
            *body,
            "</body></html>",
            "",
        ]
    )


def _render_figures(curves: Iterable[tuple[str, str]]) -> Iterator[str]:
    drawn = list(curves)
    for name, picture in drawn:
        yield f"<figure><figcaption>{html.escape(name)}</figcaption>{picture}</figure>"
    if drawn:
        yield f'<p class="label">{LEGEND}</p>'


def _render_section(section: Section) -> Iterator[str]:
    yield f"<h{section.level}>{html.escape(section.title)}</h{section.level}>"
    yield from (f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs)
    for table in section.tables:
        yield from _render_table(table)
    if section.items:
        yield from ("<ul>", *(f"<li>{html.escape(item)}</li>" for item in section.items), "</ul>")
    if section.commands:
        yield from ("<p>Next:</p>", "<ul>")
        for command, what in section.commands:
            yield f"<li><code>{html.escape(command)}</code>: {html.escape(what)}</li>"
        yield "</ul>"


def _render_table(table: Table) -> Iterator[str]:
    if table.title:
        yield f'<p class="label">{html.escape(table.title)}</p>'
    yield "<table>"
    yield _render_row("th", table.heads, table.right)
    yield from (_render_row("td", row, table.right) for row in table.rows)
    yield "</table>"
    if table.rest:
        yield f"<p>{html.escape(table.rest)}</p>"
    for name, text in table.excerpts:
        yield f'<p class="label">{html.escape(name)}:</p><blockquote>{html.escape(text)}</blockquote>'


def _render_row(tag: str, cells: Iterable[str], right: Sequence[int]) -> str:
    shown = []
    for at, cell in enumerate(cells):
        kind = ""
        if at in right:
            kind = ' class="number"'
        shown.append(f"<{tag}{kind}>{html.escape(cell)}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>"
