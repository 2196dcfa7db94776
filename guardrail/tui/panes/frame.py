"""What panes share: the title, which entries are in view, and the pointer of the selected one.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from guardrail.tui.draw.lines import Piece, Row, fit_row, make_row, title_row, wrap_text
from guardrail.tui.model.pane_state import PaneState

Fact = tuple[str, str]  # name, text; "" as name continues the fact before
_ENTRY = "entry "
_LABEL = 10  # cells of the name of a fact


def pane_title(name: str, width: int, state: PaneState, *, right: Row = ()) -> Row:
    """Return the title of a pane, with its filter; it is bright while the pane is focused."""
    if state.filter:
        gap = "  " if right else ""
        right = (*right, (f"{gap}/{state.filter}", "accent"))
    return title_row(name, width, right=right, tone="key" if state.focused else "dim")


def empty_row(state: PaneState, text: str, width: int) -> Row:
    """Return the row of a pane without entries: `text`, or that the filter matches none."""
    if state.filter:
        text = "no match for the filter"
    return fit_row(make_row((f" {text}", "dim")), width)


def entries_in_view(count: int, room: int, state: PaneState, *, tail: bool = False) -> range:
    """Return which of `count` entries of one row each are in view in `room` rows.

    These are the entries around the cursor.

    Args:
        tail: without a cursor the last entries are in view, not the first.
    """
    room = max(0, room)
    last = max(0, count - room)
    if state.cursor is not None:
        first = min(last, max(0, state.cursor - room // 2))
    else:
        first = last if tail else 0
    return range(first, min(count, first + room))


def last_rows(blocks: Sequence[list[Row]], room: int) -> list[Row]:
    """Return the last `room` rows of blocks that were collected from the last one back."""
    rows = [line for block in reversed(blocks) for line in block]
    return rows[max(0, len(rows) - room) :]


def pointer(on: bool) -> Piece:
    """Return the cell before an entry: a pointer where it is selected."""
    return ("▸", "key") if on else (" ", "key")


def last_index(count: int, state: PaneState) -> int:
    """Return the last entry in view of a pane that shows its end; -1 where it has no entry."""
    if state.cursor is None:
        return count - 1
    return min(state.cursor, count - 1)


def mark_entry(line: Row, index: int, state: PaneState) -> Row:
    """Return the entry with a pointer before it where it is selected, else with a free cell."""
    selected = state.focused and state.cursor == index
    return (entry_marker(index), pointer(selected), *line)


def entry_marker(index: int) -> Piece:
    """Return an empty piece that says which entry a row is of, for clicks of the mouse."""
    return ("", f"{_ENTRY}{index}")


def entry_of_row(line: Row) -> int | None:
    """Return the entry that a row is of; None for a row of no entry."""
    if not line or line[0][0] or not line[0][1].startswith(_ENTRY):
        return None
    return int(line[0][1].removeprefix(_ENTRY))


def named_facts(name: str, texts: Iterable[str]) -> list[Fact]:
    """Return facts of which the first has the name."""
    facts = [("", text) for text in texts]
    if facts:
        facts[0] = (name, facts[0][1])
    return facts


def fact_rows(facts: Sequence[Fact]) -> list[Row]:
    """Return one row for each (name, text)."""
    return [make_row((f"   {name:<{_LABEL}}", "dim"), text) for name, text in facts]


def wrapped_fact_rows(facts: Sequence[Fact], width: int) -> list[Row]:
    """Return the rows of (name, text) pairs, long texts wrapped under themselves.

    A text that begins with spaces keeps them on each of its rows.
    """
    rows: list[Row] = []
    for name, text in facts:
        body = text.lstrip(" ")
        indent = " " * (len(text) - len(body))
        for line in wrap_text(body, width - _LABEL - 4 - len(indent)):
            rows.append(make_row((f"   {name:<{_LABEL}}", "dim"), indent + line))
            name = ""  # it stands in the first row only
    return rows
