"""Pane 4: the states one can go back to, newest first, and whether they are safe."""

from __future__ import annotations

from collections.abc import Sequence

from guardrail.core.format import (
    clean_and_shorten,
    format_age,
    format_count,
    format_elapsed,
    format_plural,
    format_size,
)
from guardrail.core.records import SnapshotInfo, Status
from guardrail.tui.draw.lines import Piece, Row, fit_row, make_row
from guardrail.tui.model.health import format_disk_state
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import entries_in_view, mark_entry, pane_title

_WIDE = 44  # cells of an entry with the size on disk


def restorable(status: Status | None) -> list[SnapshotInfo]:
    """All states one can go back to, newest first; of the same step the memory first, since it is
    faster.
    """
    return sorted(status.snapshots, key=lambda s: (-s.step, s.tier != "memory")) if status else []


def found(view: View, state: PaneState) -> list[SnapshotInfo]:
    return [
        s
        for s in restorable(view.status)
        if not state.filter or state.shows(f"{s.step} {s.tier} {s.state}")
    ]


def count(view: View, state: PaneState) -> int:
    return len(found(view, state))


def step(view: View, state: PaneState) -> int | None:
    known = found(view, state)
    return (
        known[state.cursor].step if state.cursor is not None and state.cursor < len(known) else None
    )


def build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    known = found(view, state)
    rows = [pane_title("snapshots and checkpoints", width, state)]
    rows += [fit_row(line, width) for line in _safety(view, state)]
    if not known:
        return [*rows, ((" none yet" if not state.filter else " none like that", "dim"),)][:height]
    room = height - len(rows)
    shown = list(range(len(known)))
    if state.cursor is not None:
        shown = list(entries_in_view(len(known), room, state))
    elif len(known) > room:
        # What is in memory comes and goes; the disk is what survives, so it is never squeezed out.
        disk = [at for at in shown if known[at].tier == "disk"][: max(1, room // 2)]
        memory = [at for at in shown if known[at].tier != "disk"][: max(0, room - len(disk))]
        shown = sorted([*disk, *memory])
    rows += [
        fit_row(mark_entry(snapshot(known[at], view.now, width - 2), at, state), width)
        for at in shown
    ]
    return rows[:height]


def detail(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    """All that is known of one state."""
    known = found(view, state)
    if state.cursor is None or state.cursor >= len(known):
        return []
    info = known[state.cursor]
    facts = [
        ("state", info.state),
        ("tier", f"{info.tier} {format_size(info.bytes)}".strip()),
        ("timeline", str(info.timeline)),
        ("position", f"{format_count(info.cursor)} of the sample order"),
        (
            "taken",
            f"{format_elapsed(view.now - info.time)} ago" if info.time else "at an unknown time",
        ),
        ("path", clean_and_shorten(info.path) or "in memory only: gone with the processes"),
    ]
    return [
        make_row((f" step {format_count(info.step)}", "strong")),
        *(make_row((f"   {name:<10}", "dim"), text) for name, text in facts),
    ]


def _safety(view: View, state: PaneState) -> list[Row]:
    """What a crash now would cost; said only where there is something to lose and room is given to
    this pane.
    """
    status = view.status
    if status is None or not (state.focused or status.disk != "ok"):
        return []
    rows: list[Row] = []
    if status.disk != "ok":
        rows.append(make_row((f" ▲ {format_disk_state(status)}", "bad")))
    disk = [s.step for s in status.snapshots if s.tier == "disk" and s.state != "suspect"]
    if not status.phase.ended and disk:
        rows.append(
            make_row(
                (
                    f" a crash now costs {format_plural(max(0, status.step - max(disk)), 'step')}",
                    "dim",
                )
            )
        )
    elif not status.phase.ended and status.step:
        rows.append(
            make_row(
                (
                    f" nothing is on disk yet: a crash now costs {format_plural(status.step, 'step')}",
                    "warn",
                )
            )
        )
    return rows


def glyph(info: SnapshotInfo) -> Piece:
    """Filled: good. Hollow: candidate. Triangle: suspect. Circles are in memory, squares on
    disk.
    """
    if info.state == "suspect":
        return "▲", "warn"
    filled = info.state == "good"
    return (
        ("●" if filled else "○", "good")
        if info.tier == "memory"
        else ("■" if filled else "□", "good")
    )


def snapshot(info: SnapshotInfo, now: float, width: int = _WIDE) -> Row:
    """`● 1,280  memory        candidate      2 s`; a narrow one has no size."""
    wide = width >= _WIDE
    place = f"{info.tier} {format_size(info.bytes) if info.tier == 'disk' and wide else ''}"
    tone = "warn" if info.state == "suspect" else "plain" if info.state == "good" else "dim"
    taken = format_age(max(0.0, now - info.time)) if info.time else ""
    return (
        glyph(info),
        (
            f" {format_count(info.step):>9}  {place:<13}"
            if wide
            else f" {format_count(info.step):>9} {place:<7}",
            "plain",
        ),
        (f"{info.state:<10}", tone),
        (f"{taken:>6}", "dim"),
    )
