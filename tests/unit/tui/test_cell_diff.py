"""What a partial update puts on a terminal, against the complete frame."""

from __future__ import annotations

import itertools
from io import StringIO
from typing import Any

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate
from textual.strip import Strip

from guardrail.tui.terminal.cell_diff import render_cells, sgr_codes

WIDTH, HEIGHT = 12, 2
STYLES = [
    Style.parse(text)
    for text in ("#8899aa on #101010", "#8899aa on #303030", "bold #8899aa on #101010", "default", "reverse", "red",
                 "dim default on default", "on #101010", "italic underline #ffffff on #000000")
]  # fmt: skip
Frame = list[list[tuple[str, int]]]  # [HEIGHT][WIDTH] of character and number of a style
_cells = st.tuples(st.sampled_from("ab⠿█ "), st.integers(0, len(STYLES) - 1))
_frames = st.lists(
    st.lists(_cells, min_size=WIDTH, max_size=WIDTH), min_size=HEIGHT, max_size=HEIGHT
)


def strip_of(cells: list[tuple[str, int]]) -> Strip:
    return Strip([Segment(char, STYLES[style]) for char, style in cells])


def update(frame: Frame, spans: list[tuple[int, int, int]], cuts: list[int]) -> ChopsUpdate:
    """As the compositor hands it over: rows in pieces between cuts, and which cells of them are
    new.
    """
    pieces = list(itertools.pairwise(cuts))
    chops = [{x: strip_of(line[x:end]) for x, end in pieces} for line in frame]
    return ChopsUpdate(chops, spans, [cuts[1:]] * HEIGHT)


def terminal_of(system: Any) -> Console:
    return Console(file=StringIO(), force_terminal=True, color_system=system)


def shown(*sequences: str) -> list[list[tuple[Any, ...]]]:
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.Stream(screen)
    for sequence in sequences:
        stream.feed(sequence)
    return [[tuple(screen.buffer[y][x]) for x in range(WIDTH)] for y in range(HEIGHT)]


@settings(max_examples=80, deadline=None)
@given(
    before=_frames,
    after=_frames,
    cuts=st.sets(st.integers(1, WIDTH - 1), max_size=3),
    spans=st.lists(
        st.tuples(st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1), st.integers(1, 5)),
        max_size=4,
    ),
)
def test_the_cells_that_changed_make_the_complete_frame(
    before: Frame, after: Frame, cuts: set[int], spans: list[tuple[int, int, int]]
) -> None:
    new = [[False] * WIDTH for _ in range(HEIGHT)]
    for y, x, length in spans:
        new[y][x : min(WIDTH, x + length)] = [True] * (min(WIDTH, x + length) - x)
    after = [
        [b if fresh else a for a, b, fresh in zip(*rows, strict=True)]
        for rows in zip(before, after, new, strict=True)
    ]
    ranges = []
    for y, flags in enumerate(new):
        edges = [
            x for x in range(WIDTH + 1) if (x < WIDTH and flags[x]) != (x > 0 and flags[x - 1])
        ]
        ranges += [(y, x1, x2) for x1, x2 in zip(edges[::2], edges[1::2], strict=True)]
    where, terminal = sorted({0, WIDTH, *cuts}), terminal_of("truecolor")
    everything = [(y, 0, WIDTH) for y in range(HEIGHT)]
    first = update(before, everything, where).render_segments(terminal)
    partial = render_cells(update(after, ranges, where), terminal)
    assert shown(first, partial) == shown(
        update(after, everything, where).render_segments(terminal)
    )
    assert shown(render_cells(update(before, everything, where), terminal)) == shown(first)


@pytest.mark.parametrize("style", [0, 4])
def test_one_number_costs_one_number(style: int) -> None:
    frame: Frame = [[("a", style)] * WIDTH for _ in range(HEIGHT)]
    terminal = terminal_of("truecolor")
    sent = render_cells(update(frame, [(1, 8, 10)], [0, 4, WIDTH]), terminal)
    assert sent.startswith("\x1b[2;9H") and sent.endswith(
        "aa\x1b[0m" if style == 4 else "aa\x1b[39;49m"
    )
    assert len(sent) < 60


def test_a_wide_character_at_the_edge_leaves_no_half() -> None:
    """Rows with such characters are refreshed completely; a dialog above may still cut one in
    two.
    """
    chops = [{0: Strip([Segment("a語b" + "." * (WIDTH - 4), STYLES[0])])} for _ in range(HEIGHT)]
    cut = ChopsUpdate(chops, [(0, 2, 5)], [[WIDTH]] * HEIGHT)
    partial = render_cells(cut, terminal_of("truecolor"))
    assert "語" not in partial
    row = shown(partial)[0]
    assert [cell[0] for cell in row[2:5]] == [" ", "b", "."]


def test_colours_are_those_that_the_terminal_has() -> None:
    style = Style(color="#ff0000", bgcolor="#000000", bold=True)
    assert sgr_codes(style, ColorSystem.TRUECOLOR) == ("1", "38;2;255;0;0", "48;2;0;0;0")
    assert sgr_codes(style, ColorSystem.EIGHT_BIT) == ("1", "38;5;196", "48;5;16")
    assert sgr_codes(style, ColorSystem.STANDARD) == ("1", "31", "40")
    assert sgr_codes(Style(reverse=True), ColorSystem.STANDARD) == ("7", "", "")
