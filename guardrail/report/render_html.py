"""A report as Markdown, and as one HTML file that needs nothing else: no script, no font, no
address to fetch.

What came from outside (document names, excerpts, messages) is text here and nothing else, whatever
it holds.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence

from guardrail.report.outline import Item, Section

# ASCII punctuation that can begin something in CommonMark (section 2.4 allows a backslash before
# each), and the characters of HTML, which Markdown lets through.
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
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .4rem 0; }
dt, figcaption, .label { color: var(--dim); } dd { margin: 0; } figure { margin: 1rem 0; }
blockquote { margin: .1rem 0 .1rem 1rem; font: .85em ui-monospace, monospace; white-space: pre-wrap; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--dim); } polyline { fill: none; }
.grid { stroke: var(--line); } .here { stroke: var(--here); stroke-width: 1.4; } .band { fill: var(--band); }
.gone { stroke: var(--gone); stroke-dasharray: 3 3; } .tried { fill: var(--bad); } .eval { fill: var(--eval); }
.nan { fill: none; stroke: var(--bad); } .heading { stroke: var(--eval); stroke-dasharray: 6 3; }
.mark { stroke: var(--bad); stroke-dasharray: 2 4; } .undo { stroke: var(--undo); }
""".strip()
_LEGEND = (
    "line: the present; dashed: given up; area: from the baseline to the threshold; red: tries that were rejected "
    "(hollow: not finite); green: held-out loss, and dashed where the loss was heading before an incident; dashed "
    "upright: where a rollback or an undo went"
)


def markdown(sections: Iterable[Section]) -> str:
    """CommonMark."""
    lines: list[str] = []
    for section in sections:
        lines += [f"{'#' * section.level} {_plain(section.title)}", ""]
        lines += [f"- **{label}:** {_plain(text)}" for label, text in section.facts]
        lines += [""] if section.facts else []
        for label, items in section.lists:
            lines += [f"**{label}**", ""] if label else []
            lines += [line for item in items for line in _entry(item)]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _entry(item: Item) -> Iterator[str]:
    yield f"- {_plain(item.text)}"
    yield from (f"  - {_plain(line)}" for line in item.more)
    yield from (f"  > {_plain(quote)}" for quote in item.quotes)


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")


def page(sections: Sequence[Section], curves: Iterable[tuple[str, str]]) -> str:
    """One HTML file.

    Args:
        curves: (name, SVG) as `guardrail.report.svg_curves` draws them; they stand below the head
        of the page.
    """
    told = list(sections)
    body = [
        *_section(told[0]),
        *_figures(curves),
        *(line for section in told[1:] for line in _section(section)),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # Whatever slips in: nothing is fetched, nothing runs.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(told[0].title)}</title>",
            f"<style>\n{_STYLE}\n</style></head><body>",
            *body,
            "</body></html>",
            "",
        ]
    )


def _figures(curves: Iterable[tuple[str, str]]) -> Iterator[str]:
    drawn = list(curves)
    for name, picture in drawn:
        yield f"<figure><figcaption>{html.escape(name)}</figcaption>{picture}</figure>"
    if drawn:
        yield f'<p class="label">{_LEGEND}</p>'


def _section(section: Section) -> Iterator[str]:
    yield f"<h{section.level}>{html.escape(section.title)}</h{section.level}>"
    if section.facts:
        facts = "".join(
            f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>"
            for label, text in section.facts
        )
        yield f"<dl>{facts}</dl>"
    for label, items in section.lists:
        if label:
            yield f'<p class="label">{html.escape(label)}</p>'
        yield "<ul>"
        for item in items:
            more = "".join(f"<li>{html.escape(line)}</li>" for line in item.more)
            quotes = "".join(
                f"<blockquote>{html.escape(quote)}</blockquote>" for quote in item.quotes
            )
            yield f"<li>{html.escape(item.text)}{f'<ul>{more}</ul>' if more else ''}{quotes}</li>"
        yield "</ul>"
