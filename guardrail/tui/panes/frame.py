"""What panes share: the title, the stretch of entries in sight, the pointer before the marked one.
Pure.
"""

from __future__ import annotations

from guardrail.tui.draw.lines import Piece, Row, title_row
from guardrail.tui.model.pane_state import PaneState

_ENTRY = "entry "


def pane_title(name: str, width: int, state: PaneState, *, right: Row = ()) -> Row:
    """The title of a pane: bright while it has the keys, with the filter where there is one."""
    if state.filter:
        right = (*right, (("  " if right else "") + f"/{state.filter}", "accent"))
    return title_row(name, width, right=right, tone="key" if state.focused else "dim")


def entries_in_view(count: int, room: int, state: PaneState, *, tail: bool = False) -> range:
    """Which of `count` entries of one row each are in sight in `room` rows: those around the
    cursor.

    Args:
        tail: without a cursor the last ones are in sight, not the first.
    """
    room = max(0, room)
    last = max(0, count - room)
    if state.cursor is None:
        first = last if tail else 0
    else:
        first = min(last, max(0, state.cursor - room // 2))
    return range(first, min(count, first + room))


def mark_entry(line: Row, index: int, state: PaneState) -> Row:
    """The entry with a pointer before it where it is marked; every entry leaves that cell free."""
    on = state.focused and state.cursor == index
    return (entry_marker(index), ("▸" if on else " ", "key"), *line)


def entry_marker(index: int) -> Piece:
    """An empty piece before a row, which says what entry the row is of: a click has to find it."""
    return ("", f"{_ENTRY}{index}")


def entry_of_row(line: Row) -> int | None:
    """The entry that a row is of; None for a row of none."""
    if not line or line[0][0] or not line[0][1].startswith(_ENTRY):
        return None
    return int(line[0][1].removeprefix(_ENTRY))
