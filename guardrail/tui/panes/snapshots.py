"""Pane 4: the states one can go back to, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.records import SnapshotInfo, Status
from guardrail.tui.format import count as number
from guardrail.tui.format import duration, size
from guardrail.tui.lines import Piece, Row, fit
from guardrail.tui.panes.frame import heading, marked, window
from guardrail.tui.panes.state import State
from guardrail.tui.view import View


def restorable(status: Status | None) -> list[SnapshotInfo]:
    """All states one can go back to, newest first; of the same step the memory first, since it is faster."""
    return sorted(status.snapshots, key=lambda s: (-s.step, s.tier != "memory")) if status else []


def found(view: View, state: State) -> list[SnapshotInfo]:
    return [s for s in restorable(view.status) if state.shows(f"{s.step} {s.tier} {s.state}")]


def count(view: View, state: State) -> int:
    return len(found(view, state))


def step(view: View, state: State) -> int | None:
    known = found(view, state)
    return known[state.cursor].step if state.cursor is not None and state.cursor < len(known) else None


def build(view: View, width: int, height: int, state: State) -> Sequence[Row]:
    known = found(view, state)
    rows = [heading("snapshots and checkpoints", width, state)]
    if not known:
        return [*rows, ((" none yet" if not state.filter else " none like that", "dim"),)]
    room = height - 1
    if state.cursor is None and len(known) > room:
        # What is in memory comes and goes; the disk is what survives, so it is never squeezed out.
        disk = [s for s in known if s.tier == "disk"][: max(1, room // 2)]
        memory = [s for s in known if s.tier != "disk"][: max(0, room - len(disk))]
        known = sorted([*disk, *memory], key=lambda s: (-s.step, s.tier != "memory"))
    shown = window(len(known), room, state)
    return rows + [fit(marked(snapshot(known[index], view.now), index, state), width) for index in shown]


def glyph(info: SnapshotInfo) -> Piece:
    """Filled: good. Hollow: candidate. Triangle: suspect. Circles are in memory, squares on disk."""
    if info.state == "suspect":
        return "▲", "warn"
    filled = info.state == "good"
    return ("●" if filled else "○", "good") if info.tier == "memory" else ("■" if filled else "□", "good")


def snapshot(info: SnapshotInfo, now: float) -> Row:
    """`● 1,280  memory        candidate   0:00:02`"""
    place = f"{info.tier} {size(info.bytes) if info.tier == 'disk' else ''}"
    tone = "warn" if info.state == "suspect" else "plain" if info.state == "good" else "dim"
    age = duration(now - info.time) if info.time else ""
    return (
        glyph(info),
        (f" {number(info.step):>9}  {place:<13}", "plain"),
        (f"{info.state:<10}", tone),
        (f"{age:>9}", "dim"),
    )
