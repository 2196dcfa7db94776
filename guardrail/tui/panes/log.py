"""The pane of the journal, the newest lines at the bottom."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from guardrail.core.format import format_time_of_day
from guardrail.tui.draw.lines import Row, make_row, wrap_text
from guardrail.tui.model.log_lines import LogLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import last_index, last_rows, pane_title, pointer
from guardrail.tui.panes.pane import Pane


def _matching_lines(view: View, state: PaneState) -> list[LogLine]:
    lines = view.snapshot.story.lines
    if not state.filter:
        return list(lines)
    return [line for line in lines if state.shows(line.text)]


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    lines = _matching_lines(view, state)
    last = last_index(len(lines), state)
    room = height - 1
    blocks: list[list[Row]] = []
    for index in range(last, -1, -1):
        if sum(map(len, blocks)) >= room:
            break
        marked = state.focused and index == state.cursor
        blocks.append(log_rows(lines[index], width, marked=marked))
    return [pane_title("journal", width, state), *last_rows(blocks, room)]


def log_rows(line: LogLine, width: int, *, marked: bool = False) -> list[Row]:
    """Return the rows of one event, wrapped under its time."""
    return list(_log_rows(line, width, marked))


@lru_cache(maxsize=256)
def _log_rows(line: LogLine, width: int, marked: bool) -> tuple[Row, ...]:
    time = f"{format_time_of_day(line.time)} "
    texts = wrap_text(line.text, width - len(time) - 3)
    rows = [
        make_row(
            pointer(marked),
            (time, "dim"),
            (f"{line.mark} ", line.tone),
            (texts[0], "plain"),
        )
    ]
    for text in texts[1:]:
        rows.append(make_row((" " * (len(time) + 3), "plain"), (text, "plain")))
    return tuple(rows)


PANE = Pane(
    "log",
    "the journal: what happened, who did it, and when",
    _matching_lines,
    _build,
    step_of=lambda line: line.step,
    tail=True,
)
