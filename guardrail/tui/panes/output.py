"""Pane 8: what the ranks print, the newest at the bottom."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import format_plural
from guardrail.tui.draw.lines import Row, make_row, wrap_text
from guardrail.tui.model.logtail import PrintedLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import pane_title

_BAD = ("error", "traceback", "exception", "fatal", "nan", "killed", "out of memory")
_WARN = ("warn",)


def found(view: View, state: PaneState) -> list[PrintedLine]:
    """ "3: " as a filter shows one rank."""
    lines = view.snapshot.around.printed
    return (
        [line for line in lines if state.shows(f"{line.source}: {line.text}")]
        if state.filter
        else list(lines)
    )


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    lines = found(view, state)
    about = make_row((format_plural(len(lines), "line"), "dim")) if lines else ()
    rows: list[Row] = []
    last = len(lines) - 1 if state.cursor is None else min(state.cursor, len(lines) - 1)
    label = min(
        12, max((len(line.source) for line in lines[max(0, last - height) : last + 1]), default=1)
    )
    for index in range(last, -1, -1):
        if len(rows) >= height - 1:
            break
        rows = (
            _rows(lines[index], width, label, marked=state.focused and index == state.cursor) + rows
        )
    if not rows:
        rows = [
            make_row((" nothing printed yet" if not state.filter else " none like that", "dim"))
        ]
    return [
        pane_title("output", width, state, right=about),
        *rows[max(0, len(rows) - height + 1) :],
    ][:height]


def detail(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """The marked line in full."""
    lines = found(view, state)
    if state.cursor is None or state.cursor >= len(lines):
        return []
    line = lines[state.cursor]
    return [
        make_row((f" {line.source}", "strong")),
        *(make_row(f"   {text}") for text in wrap_text(line.text, width - 4)),
    ]


def _rows(line: PrintedLine, width: int, label: int, *, marked: bool) -> list[Row]:
    texts = wrap_text(line.text, max(1, width - label - 3))
    tone = _tone(line.text)
    head = make_row(("▸" if marked else " ", "key"), (f"{line.source[:label]:>{label}} ", "dim"))
    return [
        (*head, (texts[0], tone)),
        *(make_row((" " * (label + 2), "plain"), (text, tone)) for text in texts[1:3]),
    ]


def _tone(text: str) -> str:
    low = text.lower()
    if any(word in low for word in _BAD):
        return "bad"
    return "warn" if any(word in low for word in _WARN) else "plain"
