"""The pane of the resolved configuration: lines that differ from their default stand out."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import format_plural
from guardrail.tui.draw.lines import Row, fit_row, make_row
from guardrail.tui.model.config_lines import ConfigLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import empty_row, entries_in_view, mark_entry, pane_title
from guardrail.tui.panes.pane import Pane


def _matching_lines(view: View, state: PaneState) -> list[ConfigLine]:
    """The filter "●" shows the lines that differ."""
    return [one for one in view.snapshot.around.settings if state.shows(_text(one))]


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    shown = _matching_lines(view, state)
    rows = [pane_title("configuration", width, state, right=_count_of_changes(view, shown))]
    if not shown:
        return [*rows, empty_row(state, "no configuration in the run directory", width)]
    for index in entries_in_view(len(shown), height - 1, state):
        rows.append(fit_row(mark_entry(_line_row(shown[index]), index, state), width))
    return rows[:height]


def _count_of_changes(view: View, shown: Sequence[ConfigLine]) -> Row:
    if not shown:
        return ()
    lines = view.snapshot.around.settings
    differing = sum(one.differs for one in lines)
    return make_row((f"{differing} of {format_plural(len(lines), 'line')} not the default", "dim"))


def _line_row(one: ConfigLine) -> Row:
    mark = ("● ", "warn") if one.differs else ("  ", "plain")
    if not one.key:
        return (mark, (one.value, "plain"))
    name = f"{one.section}." if one.section else ""
    tone, default = "plain", ""
    if one.differs:
        tone, default = "strong", f"   default {one.default}"
    return (
        mark,
        (name, "dim"),
        (f"{one.key} ", tone),
        ("= ", "faint"),
        (one.value, tone),
        (default, "dim"),
    )


def _text(one: ConfigLine) -> str:
    return "".join(text for text, _ in _line_row(one))


PANE = Pane("config", "the configuration; ● differs from the default", _matching_lines, _build)
