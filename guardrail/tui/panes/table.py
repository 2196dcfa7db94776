"""All panes, once: number, name, content. The screen, its keys and its help are made from this
table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guardrail.tui.draw.lines import Row
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes import config, data, incidents, log, output, ranks, snapshots

CURVES = "curves"
Build = Callable[[View, int, int, PaneState], Sequence[Row]]


@dataclass(frozen=True)
class Pane:
    """One pane.

    Attributes:
        number: the digit that focuses it.
        name: one word.
        about: what it shows, for the help.
        build: (view, width, height, state) -> at most `height` rows, the title first. Pure.
        count: entries that a cursor can stand on, with the filter applied.
        detail: rows of the window that Enter opens for the entry under the cursor; no rows, no
        window.
        step: the step of the entry under the cursor, where the curves' value cursor goes on Enter.
        tail: it grows at its end.
    """

    number: str
    name: str
    about: str
    build: Build
    count: Callable[[View, PaneState], int]
    detail: Build | None = None
    step: Callable[[View, PaneState], int | None] | None = None
    tail: bool = False


PANES = (
    Pane("2", "incidents", "what went wrong and what was done", incidents.build, incidents.count,
         detail=incidents.detail, step=incidents.step),
    Pane("3", "ranks", "phase, own work in a step, GPU, memory, heartbeat", ranks.build, ranks.count,
         detail=ranks.detail),
    Pane("4", "snapshots", "the states one can go back to", snapshots.build, snapshots.count,
         detail=snapshots.detail, step=snapshots.step),
    Pane("5", "data", "cursor, tokens seen, and what is left out", data.build, data.count,
         detail=data.detail, step=data.step),
    Pane("6", "log", "the journal: what happened, who did it, when", log.build, log.count, step=log.step, tail=True),
    Pane("7", "config", "the configuration; ● differs from the default", config.build, config.count),
    Pane("8", "output", "what the ranks print", output.build, output.count, detail=output.detail, tail=True),
)  # fmt: skip
BY_NAME = {pane.name: pane for pane in PANES}
NAMES = (CURVES, *BY_NAME)
