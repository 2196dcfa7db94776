"""Pane 6: the journal's lines, the newest at the bottom."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from guardrail.core.format import format_time_of_day
from guardrail.tui.draw.lines import Row, make_row, wrap_text
from guardrail.tui.model.log_lines import LogLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import pane_title


def found(view: View, state: PaneState) -> list[LogLine]:
    lines = view.snapshot.story.lines
    return [line for line in lines if state.shows(line.text)] if state.filter else list(lines)


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def step(view: View, state: PaneState) -> int | None:
    lines = found(view, state)
    return (
        lines[state.cursor].step if state.cursor is not None and state.cursor < len(lines) else None
    )


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    lines = found(view, state)
    last = len(lines) - 1 if state.cursor is None else min(state.cursor, len(lines) - 1)
    rows: list[Row] = []
    for index in range(last, -1, -1):
        if len(rows) >= height - 1:
            break
        rows = log_rows(lines[index], width, marked=state.focused and index == state.cursor) + rows
    return [pane_title("journal", width, state), *rows[max(0, len(rows) - height + 1) :]]


def log_rows(line: LogLine, width: int, *, marked: bool = False) -> list[Row]:
    """One event, wrapped under its time."""
    return list(_log_rows(line, width, marked))


@lru_cache(maxsize=256)
def _log_rows(line: LogLine, width: int, marked: bool) -> tuple[Row, ...]:
    head = f"{format_time_of_day(line.time)} "
    texts = wrap_text(line.text, width - len(head) - 3)
    first = make_row(
        ("▸" if marked else " ", "key"),
        (head, "dim"),
        (f"{line.mark} ", line.tone),
        (texts[0], "plain"),
    )
    return first, *(
        make_row((" " * (len(head) + 3), "plain"), (text, "plain")) for text in texts[1:]
    )
