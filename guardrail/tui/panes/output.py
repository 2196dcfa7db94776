"""The pane of what the ranks print, the newest lines at the bottom."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import format_plural
from guardrail.tui.draw.lines import Row, make_row, wrap_text
from guardrail.tui.model.logtail import PrintedLine
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import empty_row, last_index, last_rows, pane_title, pointer
from guardrail.tui.panes.pane import Pane

# words for which a line stands out, in small letters
_BAD_WORDS = ("error", "traceback", "exception", "fatal", "nan", "killed", "out of memory")
_WARNING_WORD = "warn"
_LONGEST_SOURCE = 12  # cells of the name of a log
_MOST_ROWS = 3  # of one line


def _matching_lines(view: View, state: PaneState) -> list[PrintedLine]:
    """The filter "3: " shows one rank."""
    lines = view.snapshot.around.printed
    if not state.filter:
        return list(lines)
    return [line for line in lines if state.shows(f"{line.source}: {line.text}")]


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    lines = _matching_lines(view, state)
    if not lines:
        title = pane_title("output", width, state)
        return [title, empty_row(state, "nothing printed yet", width)][:height]
    about = make_row((format_plural(len(lines), "line"), "dim"))
    title = pane_title("output", width, state, right=about)
    last = last_index(len(lines), state)
    room = height - 1
    sources = [len(line.source) for line in lines[max(0, last - height) : last + 1]]
    label = min(_LONGEST_SOURCE, max(sources))
    blocks: list[list[Row]] = []
    for index in range(last, -1, -1):
        if sum(map(len, blocks)) >= room:
            break
        marked = state.focused and index == state.cursor
        blocks.append(_line_rows(lines[index], width, label, marked=marked))
    return [title, *last_rows(blocks, room)][:height]


def _describe(view: View, line: PrintedLine, width: int) -> Sequence[Row]:
    """Return a line in full."""
    texts = wrap_text(line.text, width - 4)
    return [make_row((f" {line.source}", "strong")), *(make_row(f"   {text}") for text in texts)]


def _line_rows(line: PrintedLine, width: int, label: int, *, marked: bool) -> list[Row]:
    texts = wrap_text(line.text, max(1, width - label - 3))[:_MOST_ROWS]
    tone = _tone_of(line.text)
    source = f"{line.source[:label]:>{label}} "
    rows = [make_row(pointer(marked), (source, "dim"))]
    rows[0] = (*rows[0], (texts[0], tone))
    for text in texts[1:]:
        rows.append(make_row((" " * (label + 2), "plain"), (text, tone)))
    return rows


def _tone_of(text: str) -> str:
    small = text.lower()
    if any(word in small for word in _BAD_WORDS):
        return "bad"
    if _WARNING_WORD in small:
        return "warn"
    return "plain"


PANE = Pane(
    "output", "what the ranks print", _matching_lines, _build, describe=_describe, tail=True
)
