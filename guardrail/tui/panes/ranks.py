"""Pane 3: the ranks. A row each while they fit; else a heat map, and the worst of them by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len

from guardrail.core.format import (
    clean_and_shorten,
    format_count,
    format_elapsed,
    format_plural,
    format_size,
)
from guardrail.tui.draw.lines import Row, fit_row, make_row, row_width
from guardrail.tui.model.health import PHASES
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.rank_health import RankHealth, assess_ranks, median_step_seconds
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import entries_in_view, mark_entry, pane_title

# Least ratio to the median -> the cell of a rank on the map.
_HEAT = (
    (2.0, "█", "bad"),
    (1.5, "▓", "warn"),
    (1.25, "▒", "warn"),
    (1.1, "░", "plain"),
    (0.0, "·", "dim"),
)
_TROUBLE = {
    "silent": ("?", "bad"),
    "failed": ("✗", "bad"),
    "stuck": ("‖", "bad"),
    "slow": ("▲", "warn"),
}
_BAR = 24  # most cells of a bar
_GUTTER = 7  # cells of the number before a row of the map
MAP_FROM = 65  # ranks from which on there is a map
_NAMED = 3  # ranks that are named below the map, at least


def found(view: View, state: PaneState) -> list[RankHealth]:
    """Those that the filter lets through: by number while each has a row, else the worst first."""
    ended = view.status is not None and view.status.phase.ended
    judged = assess_ranks(view.snapshot.around.ranks, _now(view), ended=ended)
    return [one for one in judged if state.shows(_text(one))] if state.filter else judged


def _now(view: View) -> float:
    return min(view.now, view.snapshot.around.looked)


def ordered(view: View, state: PaneState) -> list[RankHealth]:
    """In the order of the cursor: by number, and under a map the worst first."""
    return _ordered(view, found(view, state))


def _ordered(view: View, shown: list[RankHealth]) -> list[RankHealth]:
    mapped = len(view.snapshot.around.ranks) >= MAP_FROM
    return sorted(shown, key=lambda one: one.weight) if mapped else shown


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    shown = found(view, state)
    hosts = len({one.rank.told.host for one in shown})
    about = f"{format_count(len(shown))} on {format_plural(hosts, 'host')}" if shown else ""
    rows = [pane_title("ranks", width, state, right=make_row((about, "dim")))]
    if not shown:
        return [
            *rows,
            make_row(
                (" no rank has reported yet" if not state.filter else " none like that", "dim")
            ),
        ]
    rows.append(fit_row(_summary(view, shown, width), width))
    room = height - len(rows)
    worst = _ordered(view, shown)
    if len(view.snapshot.around.ranks) >= MAP_FROM:
        named = max(min(_NAMED, room - 1), room - math.ceil(len(shown) / max(1, width - _GUTTER)))
        rows += heat_map(shown, width, max(0, room - named))
        room = height - len(rows)
    longest = max((one.rank.told.step_seconds for one in shown), default=0.0)
    for index in entries_in_view(len(worst), room, state):
        rows.append(
            fit_row(
                mark_entry(_rank(worst[index], _now(view), longest, width), index, state), width
            )
        )
    return rows[:height]


def detail(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """All that the marked rank says of itself."""
    worst = ordered(view, state)
    if state.cursor is None or state.cursor >= len(worst):
        return []
    one = worst[state.cursor]
    told = one.rank.told
    facts = [
        ("phase", PHASES[told.phase]),
        ("trouble", _words(one) if one.trouble else "none"),
        ("step", format_count(told.step)),
        ("own work", f"{_seconds(told.step_seconds)} of a step, {one.ratio:.2f} × the median"),
        ("host", f"{clean_and_shorten(told.host, 80)}, process {told.pid}"),
        ("memory", format_size(told.memory_bytes) or "unknown"),
        ("GPU", _gpu(one)),
        ("heard", f"{format_elapsed(_now(view) - one.rank.heard)} ago"),
        ("progress", f"{format_elapsed(_now(view) - one.rank.moved)} ago"),
        ("start", f"{told.incarnation}"),
        ("log", f"logs/rank-{told.rank}.log"),
    ]
    return [
        make_row((f" rank {told.rank}", "strong")),
        *(make_row((f"   {name:<10}", "dim"), text) for name, text in facts),
    ]


def heat_map(ranks: Sequence[RankHealth], width: int, height: int) -> list[Row]:
    """A cell for each rank, or for each group of them, which is as its worst. Rows begin with a
    rank's number.
    """
    cells = width - _GUTTER
    cells -= cells % 8 if cells >= 16 else 0  # ranks of one host stand together
    if cells < 1 or height < 1:
        return []
    group = max(1, math.ceil(len(ranks) / (cells * height)))
    rows: list[Row] = []
    for first in range(0, len(ranks), cells * group):
        stretch = ranks[first : first + cells * group]
        line: list[tuple[str, str]] = [(f"{stretch[0].rank.told.rank:>{_GUTTER - 1}} ", "dim")]
        for begin in range(0, len(stretch), group):
            glyph, tone = _cell(min(stretch[begin : begin + group], key=lambda one: one.weight))
            if line[-1][1] == tone and len(line) > 1:
                line[-1] = (line[-1][0] + glyph, tone)
            else:
                line.append((glyph, tone))
        rows.append(tuple(line))
    return rows


def _cell(one: RankHealth) -> tuple[str, str]:
    if one.trouble in ("silent", "failed", "stuck"):
        return _TROUBLE[one.trouble]
    return next((glyph, tone) for least, glyph, tone in _HEAT if one.ratio >= least)


def _summary(view: View, shown: Sequence[RankHealth], width: int) -> Row:
    usual = median_step_seconds([one.rank for one in shown])
    line: list[tuple[str, str]] = [(f" median {_seconds(usual)}", "plain")]
    slowest = max(shown, key=lambda one: one.rank.told.step_seconds)
    total = sum(times for _, times in view.snapshot.around.slowest)
    often, times = max(view.snapshot.around.slowest, key=lambda pair: pair[1], default=(-1, 0))
    if slowest.rank.told.step_seconds > 0 and len(shown) > 1:
        told = slowest.rank.told
        tone = "warn" if slowest.trouble == "slow" else "plain"
        line.append(
            (
                f"   slowest {told.rank} ({clean_and_shorten(told.host, 24)}) {_seconds(told.step_seconds)}",
                tone,
            )
        )
        if told.rank == often:
            line.append((f", in {times} of {format_plural(total, 'step')}", "dim"))
    for trouble in ("silent", "stuck", "failed"):
        if many := sum(one.trouble == trouble for one in shown):
            line.append((f"   {_TROUBLE[trouble][0]} {many} {trouble}", "bad"))
    if any(one.rank.told.gpu_memory_bytes and one.rank.told.gpu_percent < 0 for one in shown):
        line.append(("   GPU use unknown: needs guardrail[gpu]", "dim"))
    if total and slowest.rank.told.rank != often:
        line.append((f"   {often} was slowest in {times} of {format_plural(total, 'step')}", "dim"))
    while row_width(tuple(line)) > width and any(tone == "dim" for _, tone in line):
        line.remove(next(piece for piece in reversed(line) if piece[1] == "dim"))
    return tuple(line)


def _rank(one: RankHealth, now: float, longest: float, width: int) -> Row:
    told = one.rank.told
    glyph, tone = _TROUBLE.get(one.trouble, ("●", "good"))
    head: Row = (
        (f"{told.rank:>5} ", "strong"),
        (f"{glyph} ", tone),
        (f"{_words(one):<15}", tone if one.trouble else "plain"),
    )
    bar = min(_BAR, max(0, width - 68))
    if bar >= 6:
        filled = round(bar * told.step_seconds / longest) if longest > 0 else 0
        head = (
            *head,
            ("▇" * filled, tone if one.trouble == "slow" else "accent"),
            (" " * (bar - filled), "plain"),
        )
    line: Row = (*head, (f" {_seconds(told.step_seconds):>8}", "plain"))
    memory = format_size(told.gpu_memory_bytes or told.memory_bytes)
    gpu = [f"  GPU {told.gpu_percent:>3.0f} %"] if told.gpu_percent >= 0 else []
    more = [
        *gpu,
        f"{memory:>9}",
        f" {format_elapsed(now - one.rank.heard):>9}",
        f"  {clean_and_shorten(told.host, 40)}",
    ]
    for text in more:  # as many as there is room for
        if row_width(line) + cell_len(text) < width:
            line = (*line, (text, "dim"))
    return line


def _gpu(one: RankHealth) -> str:
    told = one.rank.told
    unknown = "use unknown: pip install 'guardrail[gpu]' where the run trains (nvidia-ml-py)"
    busy = f"{told.gpu_percent:.0f} % busy" if told.gpu_percent >= 0 else unknown
    used = format_size(told.gpu_memory_bytes)
    return f"{busy}, {used} in use" if used else "none" if told.gpu_percent < 0 else busy


def _words(one: RankHealth) -> str:
    """Its trouble, else its phase."""
    if one.trouble in ("silent", "stuck"):
        return f"{one.trouble} {format_elapsed(one.seconds)}"
    return (
        f"{one.ratio:.1f} × median"
        if one.trouble == "slow"
        else one.trouble or PHASES[one.rank.told.phase]
    )


def _text(one: RankHealth) -> str:
    told = one.rank.told
    return f"{told.rank} {told.host} {PHASES[told.phase]} {one.trouble}"


def _seconds(value: float) -> str:
    if not value > 0:
        return "–"
    return f"{1000 * value:,.0f} ms" if value < 10 else f"{value:,.1f} s"
