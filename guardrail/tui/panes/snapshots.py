"""The pane of the states that a rollback can restore, newest first, and whether they are safe."""

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
from guardrail.core.records.status import SnapshotInfo, Status
from guardrail.tui.draw.lines import Piece, Row, fit_row, make_row
from guardrail.tui.model.health import format_disk_state
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.view import View
from guardrail.tui.panes.frame import (
    empty_row,
    entries_in_view,
    fact_rows,
    mark_entry,
    pane_title,
)
from guardrail.tui.panes.pane import Pane

TITLE = "snapshots and checkpoints"
_WIDE = 44  # cells from which on an entry has the size on disk
_TONES = {"suspect": "warn", "good": "plain"}  # (in memory, good) -> symbol
_SYMBOLS = {(True, True): "●", (True, False): "○", (False, True): "■", (False, False): "□"}
# state -> tone of its word; others are dim


def restorable_states(status: Status | None) -> list[SnapshotInfo]:
    """Return all states that a rollback can restore, newest first.

    Of the same step the one in memory stands first: it is faster.
    """
    if status is None:
        return []
    return sorted(status.snapshots, key=lambda s: (-s.step, s.tier != "memory"))


def _matching_states(view: View, state: PaneState) -> list[SnapshotInfo]:
    states = restorable_states(view.status)
    if not state.filter:
        return states
    return [s for s in states if state.shows(f"{s.step} {s.tier} {s.state}")]


def _build(view: View, width: int, height: int, state: PaneState) -> Sequence[Row]:
    known = _matching_states(view, state)
    rows = [pane_title(TITLE, width, state)]
    rows += [fit_row(line, width) for line in _safety_rows(view, state)]
    if not known:
        return [*rows, empty_row(state, "none yet", width)][:height]
    for at in _states_in_view(known, height - len(rows), state):
        line = mark_entry(snapshot_row(known[at], view.now, width - 2), at, state)
        rows.append(fit_row(line, width))
    return rows[:height]


def _states_in_view(known: Sequence[SnapshotInfo], room: int, state: PaneState) -> Sequence[int]:
    """Return the indices of the states that have a row.

    Without a cursor half of the rows are kept for the disk: only these states survive a crash.
    """
    if state.cursor is not None:
        return entries_in_view(len(known), room, state)
    if len(known) <= room:
        return range(len(known))
    disk = [at for at, one in enumerate(known) if one.tier == "disk"][: max(1, room // 2)]
    memory = [at for at, one in enumerate(known) if one.tier != "disk"]
    return sorted([*disk, *memory[: max(0, room - len(disk))]])


def _describe(view: View, info: SnapshotInfo, width: int) -> Sequence[Row]:
    """Return all that is known of one state."""
    taken = "at an unknown time"
    if info.time:
        taken = f"{format_elapsed(view.now - info.time)} ago"
    facts = [
        ("state", info.state),
        ("tier", f"{info.tier} {format_size(info.bytes)}".strip()),
        ("timeline", str(info.timeline)),
        ("position", f"{format_count(info.cursor)} of the sample order"),
        ("taken", taken),
        ("path", clean_and_shorten(info.path) or "in memory only: lost when the processes end"),
    ]
    return [make_row((f" step {format_count(info.step)}", "strong")), *fact_rows(facts)]


def _safety_rows(view: View, state: PaneState) -> list[Row]:
    """Return what a crash now would cost, where this pane is focused or the disk is failing."""
    status = view.status
    if status is None or not (state.focused or status.disk != "ok"):
        return []
    rows: list[Row] = []
    if status.disk != "ok":
        rows.append(make_row((f" ▲ {format_disk_state(status)}", "bad")))
    disk = [s.step for s in status.snapshots if s.tier == "disk" and s.state != "suspect"]
    if status.phase.ended:
        return rows
    if disk:
        lost = format_plural(max(0, status.step - max(disk)), "step")
        rows.append(make_row((f" a crash now costs {lost}", "dim")))
    elif status.step:
        lost = format_plural(status.step, "step")
        rows.append(make_row((f" no checkpoint on disk yet: a crash now costs {lost}", "warn")))
    return rows


def state_symbol(info: SnapshotInfo) -> Piece:
    """Return a circle for memory, a square for the disk, a triangle for a suspect state.

    A good state is filled, a candidate hollow.
    """
    if info.state == "suspect":
        return "▲", "warn"
    return _SYMBOLS[info.tier == "memory", info.state == "good"], "good"


def snapshot_row(info: SnapshotInfo, now: float, width: int = _WIDE) -> Row:
    """Return `● 1,280  memory        candidate      2 s`; a narrow one has no size."""
    place = f" {format_count(info.step):>9} {info.tier + ' ':<7}"
    if width >= _WIDE:
        size = format_size(info.bytes) if info.tier == "disk" else ""
        place = f" {format_count(info.step):>9}  {f'{info.tier} {size}':<13}"
    taken = format_age(max(0.0, now - info.time)) if info.time else ""
    return (
        state_symbol(info),
        (place, "plain"),
        (f"{info.state:<10}", _TONES.get(info.state, "dim")),
        (f"{taken:>6}", "dim"),
    )


PANE = Pane(
    "snapshots",
    "states that a rollback can restore",
    _matching_states,
    _build,
    describe=_describe,
    step_of=lambda info: info.step,
)
