"""Pane 3: the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.records import RankStatus
from guardrail.tui.format import brief, duration, size
from guardrail.tui.format import count as number
from guardrail.tui.lines import Row, fit, row
from guardrail.tui.panes.frame import heading, marked, window
from guardrail.tui.panes.state import State
from guardrail.tui.view import View


def found(view: View, state: State) -> list[RankStatus]:
    return [rank for rank in view.snapshot.ranks if state.shows(f"{rank.rank} {rank.host} {rank.phase.value}")]


def count(view: View, state: State) -> int:
    return len(found(view, state))


def build(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    ranks = found(view, state)
    rows = [heading("ranks", width, state, right=row((number(len(ranks)), "dim")))]
    if not ranks:
        return [*rows, row((" no rank has reported yet", "dim"))]
    for index in window(len(ranks), height - 1, state):
        rows.append(fit(marked(_rank(ranks[index], view), index, state), width))
    return rows


def _rank(rank: RankStatus, view: View) -> Row:
    took = f"{1000 * rank.step_seconds:,.0f} ms" if rank.step_seconds > 0 else "–"
    return (
        (f"{rank.rank:>5} ", "strong"),
        (f"{rank.phase.value:<9}{took:>10}{size(rank.memory_bytes):>9}", "plain"),
        (f"{duration(view.now - rank.heartbeat):>9}  {brief(rank.host, 40)}", "dim"),
    )
