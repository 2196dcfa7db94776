"""Pane 6: the journal's lines, the newest at the bottom."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from guardrail.core.format import format_time_of_day
from guardrail.tui.draw.lines import Row, row, wrap
from guardrail.tui.model.log_lines import Line
from guardrail.tui.model.pane_state import State
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import heading


def found(view: View, state: State) -> list[Line]:
    lines = view.snapshot.story.lines
    return [line for line in lines if state.shows(line.text)] if state.filter else list(lines)


def count(view: View, state: State) -> int:
    return len(found(view, state))


def step(view: View, state: State) -> int | None:
    lines = found(view, state)
    return (
        lines[state.cursor].step if state.cursor is not None and state.cursor < len(lines) else None
    )


def build(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    lines = found(view, state)
    last = len(lines) - 1 if state.cursor is None else min(state.cursor, len(lines) - 1)
    rows: list[Row] = []
    for index in range(last, -1, -1):
        if len(rows) >= height - 1:
            break
        rows = log_rows(lines[index], width, marked=state.focused and index == state.cursor) + rows
    return [heading("journal", width, state), *rows[max(0, len(rows) - height + 1) :]]


def log_rows(line: Line, width: int, *, marked: bool = False) -> list[Row]:
    """One event, wrapped under its time."""
    return list(_log_rows(line, width, marked))


@lru_cache(maxsize=256)
def _log_rows(line: Line, width: int, marked: bool) -> tuple[Row, ...]:
    head = f"{format_time_of_day(line.time)} "
    texts = wrap(line.text, width - len(head) - 3)
    first = row(
        ("▸" if marked else " ", "key"),
        (head, "dim"),
        (f"{line.mark} ", line.tone),
        (texts[0], "plain"),
    )
    return first, *(row((" " * (len(head) + 3), "plain"), (text, "plain")) for text in texts[1:])
