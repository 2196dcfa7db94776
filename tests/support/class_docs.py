"""The generated parts of docs/detection.md and docs/remedies.md, from the classes themselves.

The rest of both pages is written by hand. A generated part stands between two comments:

    <!-- begin NAME: ... -->
    <!-- end NAME -->
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import msgspec

from guardrail.core.section import Section
from guardrail.decide.remedies.registry import REMEDIES
from guardrail.detectors.base import Detector
from guardrail.detectors.build import DETECTORS, ON_DEMAND, SETTINGS


def fill_part(page: str, name: str, content: str) -> str:
    """Return the page with other content in one of its generated parts."""
    part = re.compile(rf"(<!-- begin {name}:[^\n]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not part.search(page):
        raise ValueError(f"the page has no part {name!r}")
    return part.sub(lambda match: f"{match[1]}\n{content.strip()}\n\n{match[2]}", page, count=1)


def fill_detection(page: str) -> str:
    """Return docs/detection.md with its generated part."""
    classes = [*DETECTORS, *ON_DEMAND]
    page = fill_part(page, "settings", settings_table())
    return fill_part(page, "detectors", f"{table_of(classes)}\n\n{sections_of(classes)}")


def fill_remedies(page: str) -> str:
    """Return docs/remedies.md with its generated part."""
    lines = ["| remedy | what it does | keys |", "|---|---|---|"]
    for cls in REMEDIES:
        keys = ", ".join(f"`{key}`" for key in cls.keys) or "none"
        lines.append(f"| `{cls.action}` | {cls.help} | {keys} |")
    return fill_part(page, "remedies", "\n".join(lines))


def settings_table() -> str:
    """Return a table with one row for each key of [guard.detectors]."""
    lines = ["| key of `[guard.detectors]` | default | meaning |", "|---|---|---|"]
    for table, settings in SETTINGS.items():
        comments = comments_of(settings)
        for field in msgspec.structs.fields(settings):
            meaning = comments[field.name]
            lines.append(f"| `{table}.{field.name}` | {field.default} | {meaning} |")
    return "\n".join(lines)


def comments_of(section: type[Section]) -> dict[str, str]:
    """Return field -> the comment above it, or above the group of fields that it is in."""
    found: dict[str, str] = {}
    comment: list[str] = []
    fresh = True  # the next comment line begins a new comment
    for line in inspect.getsource(section).splitlines():
        text = line.strip()
        if text.startswith("#"):
            if fresh:
                comment = []
            comment.append(text.lstrip("# "))
            fresh = False
            continue
        field = re.match(r"    (\w+): ", line)
        if field is not None:
            found[field[1]] = " ".join(comment)
        elif not text:
            comment = []
        fresh = True
    return found


def table_of(classes: Sequence[type[Detector]]) -> str:
    """Return a table with one row for each detector."""
    lines = [
        "## All detectors",
        "",
        "| detector | signals | severity | keys |",
        "|---|---|---|---|",
    ]
    for cls in classes:
        signals = cls.watches or ", ".join(cls.signals) or "every step"
        severities = ", ".join(severity.value for severity in cls.severities)
        keys = ", ".join(f"`{key.removeprefix('detectors.')}`" for key in cls.keys) or "none"
        lines.append(
            f"| [`{cls.name}`](#{anchor(cls.title)}) | {signals} | {severities} | {keys} |"
        )
    return "\n".join(lines)


def sections_of(classes: Sequence[type[Detector]]) -> str:
    """Return one section for each title, with the text of the first class that has it."""
    sections: dict[str, str] = {}
    for cls in classes:
        sections.setdefault(cls.title, f"## {cls.title}\n\n{cls.help}")
    return "\n\n".join(sections.values())


def anchor(title: str) -> str:
    """Return the anchor that a heading gets on the page."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
