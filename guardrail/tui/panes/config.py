"""Pane 7: the resolved configuration."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.tui.lines import Row, fit, row
from guardrail.tui.panes.frame import heading, marked, window
from guardrail.tui.panes.state import State
from guardrail.tui.view import View


def found(view: View, state: State) -> list[str]:
    return [line for line in view.snapshot.config if state.shows(line)]


def count(view: View, state: State) -> int:
    return len(found(view, state))


def build(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    lines = found(view, state)
    rows = [heading("configuration", width, state)]
    if not lines:
        return [*rows, row((" none on record", "dim"))]
    for index in window(len(lines), height - 1, state):
        rows.append(fit(marked(row((lines[index], "plain")), index, state), width))
    return rows
