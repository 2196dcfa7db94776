"""The pane of the ranks: a row each while they fit; else a heat map, and the worst ranks by name."""

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
from guardrail.tui.draw.lines import Piece, Row, fit_row, make_row, row_width
from guardrail.tui.model.health import PHASES
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.rank_health import RankHealth, assess_ranks, median_step_seconds
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import (
    empty_row,
    entries_in_view,
    fact_rows,
    mark_entry,
    pane_title,
)
from guardrail.tui.panes.pane import Pane

# Least ratio to the median -> the cell of a rank on the map.
_HEAT = (
    (2.0, "█", "bad"),
    (1.5, "▓", "warn"),
    (1.25, "▒", "warn"),
    (1.1, "░", "plain"),
    (0.0, "·", "dim"),
)
_FAULTS = {
    "silent": ("?", "bad"),
    "failed": ("✗", "bad"),
    "stuck": ("‖", "bad"),
    "slow": ("▲", "warn"),
}
_BAR = 24  # most cells of a bar
_LEAST_BAR = 6  # a narrower bar says nothing
_BESIDE_BAR = 68  # cells of all other columns
_GUTTER = 7  # cells of the number before a row of the map
_HOST_CELLS = 8  # a row of the map is a multiple of them: the ranks of one host stand together
MAP_FROM = 65  # ranks from which on there is a map
_NAMED = 3  # ranks that are named below the map, at least
_NO_GPU_USE = "use unknown: pip install 'guardrail[gpu]' where the run trains (nvidia-ml-py)"


def matching_ranks(view: View, state: PaneState) -> list[RankHealth]:
    """Return the ranks that the filter shows, by number."""
    ended = view.status is not None and view.status.phase.ended
    ranks = assess_ranks(view.snapshot.around.ranks, _now(view), ended=ended)
    if not state.filter:
        return ranks
    return [one for one in ranks if state.shows(_text(one))]


def _now(view: View) -> float:
    """Return the time until which the ranks are known: no rank is silent between two reads."""
    return min(view.now, view.snapshot.around.looked)


def _ordered(view: View, ranks: list[RankHealth]) -> list[RankHealth]:
    """Return the ranks as the cursor moves through them: under a map the worst come first."""
    if not _has_map(view):
        return ranks
    return sorted(ranks, key=lambda one: one.weight)


def _has_map(view: View) -> bool:
    return len(view.snapshot.around.ranks) >= MAP_FROM


def _entries(view: View, state: PaneState) -> list[RankHealth]:
    return _ordered(view, matching_ranks(view, state))


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    shown = matching_ranks(view, state)
    if not shown:
        empty = empty_row(state, "no rank has reported yet", width)
        return [pane_title("ranks", width, state), empty]
    hosts = len({one.rank.status.host for one in shown})
    about = f"{format_count(len(shown))} on {format_plural(hosts, 'host')}"
    rows = [pane_title("ranks", width, state, right=make_row((about, "dim")))]
    rows.append(_summary_row(view, shown, width))
    if _has_map(view):
        room = height - len(rows)
        map_rows = math.ceil(len(shown) / max(1, width - _GUTTER))
        named = max(min(_NAMED, room - 1), room - map_rows)
        rows += heat_map(shown, width, max(0, room - named))
    ordered = _ordered(view, shown)
    longest = max(one.rank.status.step_seconds for one in shown)
    for index in entries_in_view(len(ordered), height - len(rows), state):
        line = _rank_row(ordered[index], _now(view), longest, width)
        rows.append(fit_row(mark_entry(line, index, state), width))
    return rows[:height]


def _describe(view: View, one: RankHealth, width: int) -> Sequence[Row]:
    """Return all that a rank reports of itself."""
    status = one.rank.status
    step_time = f"{_seconds(status.step_seconds)} of a step, {one.ratio:.2f} × the median"
    facts = [
        ("phase", PHASES[status.phase]),
        ("fault", _state_words(one) if one.fault else "none"),
        ("step", format_count(status.step)),
        ("own work", step_time),
        ("host", f"{clean_and_shorten(status.host, 80)}, process {status.pid}"),
        ("memory", format_size(status.memory_bytes) or "unknown"),
        ("GPU", _gpu_words(one)),
        ("heartbeat", f"{format_elapsed(_now(view) - one.rank.heard)} ago"),
        ("progress", f"{format_elapsed(_now(view) - one.rank.moved)} ago"),
        ("start", f"{status.incarnation}"),
        ("log", f"logs/rank-{status.rank}.log"),
    ]
    return [make_row((f" rank {status.rank}", "strong")), *fact_rows(facts)]


# -- the map


def heat_map(ranks: Sequence[RankHealth], width: int, height: int) -> list[Row]:
    """Return rows of cells, a cell for each rank, or for each group of ranks.

    A group looks like its worst rank. Each row begins with the number of its first rank.
    """
    cells = width - _GUTTER
    if cells >= 2 * _HOST_CELLS:
        cells -= cells % _HOST_CELLS
    if cells < 1 or height < 1:
        return []
    group = max(1, math.ceil(len(ranks) / (cells * height)))
    rows: list[Row] = []
    for first in range(0, len(ranks), cells * group):
        in_row = ranks[first : first + cells * group]
        line: list[Piece] = [(f"{in_row[0].rank.status.rank:>{_GUTTER - 1}} ", "dim")]
        for begin in range(0, len(in_row), group):
            worst = min(in_row[begin : begin + group], key=lambda one: one.weight)
            glyph, tone = _map_cell(worst)
            if line[-1][1] == tone and len(line) > 1:
                line[-1] = (line[-1][0] + glyph, tone)
            else:
                line.append((glyph, tone))
        rows.append(tuple(line))
    return rows


def _map_cell(one: RankHealth) -> Piece:
    if one.fault in ("silent", "failed", "stuck"):
        return _FAULTS[one.fault]
    return next((glyph, tone) for least, glyph, tone in _HEAT if one.ratio >= least)


# -- rows


def _summary_row(view: View, shown: Sequence[RankHealth], width: int) -> Row:
    """Return the median and what stands out; dim parts are dropped where it is narrow."""
    median = median_step_seconds([one.rank for one in shown])
    line: list[Piece] = [(f" median {_seconds(median)}", "plain")]
    line += _slowest_pieces(view, shown)
    while row_width(tuple(line)) > width and any(tone == "dim" for _, tone in line):
        line.remove(next(piece for piece in reversed(line) if piece[1] == "dim"))
    return fit_row(tuple(line), width)


def _slowest_pieces(view: View, shown: Sequence[RankHealth]) -> list[Piece]:
    counts = view.snapshot.around.slowest
    total = sum(times for _, times in counts)
    often, times = max(counts, key=lambda pair: pair[1], default=(-1, 0))
    in_steps = f"in {times} of {format_plural(total, 'step')}"
    slowest = max(shown, key=lambda one: one.rank.status.step_seconds)
    status = slowest.rank.status
    pieces: list[Piece] = []
    if status.step_seconds > 0 and len(shown) > 1:
        tone = "warn" if slowest.fault == "slow" else "plain"
        host, seconds = clean_and_shorten(status.host, 24), _seconds(status.step_seconds)
        pieces.append((f"   slowest {status.rank} ({host}) {seconds}", tone))
        if status.rank == often:
            pieces.append((f", {in_steps}", "dim"))
    for fault in ("silent", "stuck", "failed"):
        if many := sum(one.fault == fault for one in shown):
            pieces.append((f"   {_FAULTS[fault][0]} {many} {fault}", "bad"))
    if any(one.rank.status.gpu_memory_bytes and one.rank.status.gpu_percent < 0 for one in shown):
        pieces.append(("   GPU use unknown: needs guardrail[gpu]", "dim"))
    if total and status.rank != often:
        pieces.append((f"   {often} was slowest {in_steps}", "dim"))
    return pieces


def _rank_row(one: RankHealth, now: float, longest: float, width: int) -> Row:
    """Return the columns of one rank, as many as there is room for.

    Args:
        longest: seconds that the longest bar stands for.
    """
    status = one.rank.status
    glyph, tone = _FAULTS.get(one.fault, ("●", "good"))
    line: list[Piece] = [
        (f"{status.rank:>5} ", "strong"),
        (f"{glyph} ", tone),
        (f"{_state_words(one):<15}", tone if one.fault else "plain"),
        *_bar_pieces(one, longest, min(_BAR, max(0, width - _BESIDE_BAR))),
        (f" {_seconds(status.step_seconds):>8}", "plain"),
    ]
    memory = format_size(status.gpu_memory_bytes or status.memory_bytes)
    columns = [
        f"{memory:>9}",
        f" {format_elapsed(now - one.rank.heard):>9}",
        f"  {clean_and_shorten(status.host, 40)}",
    ]
    if status.gpu_percent >= 0:
        columns.insert(0, f"  GPU {status.gpu_percent:>3.0f} %")
    used = row_width(tuple(line))
    for text in columns:
        if used + cell_len(text) < width:
            line.append((text, "dim"))
            used += cell_len(text)
    return tuple(line)


def _bar_pieces(one: RankHealth, longest: float, cells: int) -> list[Piece]:
    if cells < _LEAST_BAR:
        return []
    filled, tone = 0, "accent"
    if longest > 0:
        filled = round(cells * one.rank.status.step_seconds / longest)
    if one.fault == "slow":
        tone = _FAULTS["slow"][1]
    return [("▇" * filled, tone), (" " * (cells - filled), "plain")]


def _gpu_words(one: RankHealth) -> str:
    status = one.rank.status
    used = format_size(status.gpu_memory_bytes)
    if status.gpu_percent < 0:
        return f"{_NO_GPU_USE}, {used} in use" if used else "none"
    busy = f"{status.gpu_percent:.0f} % busy"
    return f"{busy}, {used} in use" if used else busy


def _state_words(one: RankHealth) -> str:
    """Return the fault of a rank with its number, else its phase."""
    if one.fault in ("silent", "stuck"):
        return f"{one.fault} {format_elapsed(one.seconds)}"
    if one.fault == "slow":
        return f"{one.ratio:.1f} × median"
    return one.fault or PHASES[one.rank.status.phase]


def _text(one: RankHealth) -> str:
    status = one.rank.status
    return f"{status.rank} {status.host} {PHASES[status.phase]} {one.fault}"


def _seconds(value: float) -> str:
    if not value > 0:
        return "–"
    if value < 10:
        return f"{1000 * value:,.0f} ms"
    return f"{value:,.1f} s"


PANE = Pane(
    "ranks",
    "phase, own work in a step, GPU, memory, heartbeat",
    _entries,
    _build,
    describe=_describe,
)
