"""Pane 7: the resolved configuration; what differs from the defaults stands out, with the default
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import format_plural
from guardrail.tui.draw.lines import Row, fit_row, make_row
from guardrail.tui.model.config_lines import ConfigLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import entries_in_view, mark_entry, pane_title


def found(view: View, state: PaneState) -> list[ConfigLine]:
    """Filter "●" shows what differs."""
    return [one for one in view.snapshot.around.settings if state.shows(_text(one))]


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    shown = found(view, state)
    differing = sum(one.differs for one in view.snapshot.around.settings)
    about = (
        f"{differing} of {format_plural(len(view.snapshot.around.settings), 'line')} not the default"
        if shown
        else ""
    )
    rows = [pane_title("configuration", width, state, right=make_row((about, "dim")))]
    if not shown:
        return [
            *rows,
            make_row((" none on record" if not state.filter else " none like that", "dim")),
        ]
    for index in entries_in_view(len(shown), height - 1, state):
        rows.append(fit_row(mark_entry(_line(shown[index]), index, state), width))
    return rows[:height]


def _line(one: ConfigLine) -> Row:
    name = f"{one.section}." if one.section else ""
    mark = ("● ", "warn") if one.differs else ("  ", "plain")
    if not one.key:
        return (mark, (one.value, "plain"))
    tone = "strong" if one.differs else "plain"
    default = (f"   default {one.default}", "dim") if one.differs else ("", "dim")
    return (mark, (name, "dim"), (f"{one.key} ", tone), ("= ", "faint"), (one.value, tone), default)


def _text(one: ConfigLine) -> str:
    return "".join(text for text, _ in _line(one))
