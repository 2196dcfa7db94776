"""What the lines around the panes say: functions of (view, width, height) to rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.records import Phase
from guardrail.tui import keys
from guardrail.tui.format import count, duration, metric, plural
from guardrail.tui.health import HEARTBEAT_SECONDS, PHASES
from guardrail.tui.lines import Piece, Row, fit, row, spread, width_of
from guardrail.tui.view import View


def header(view: View, width: int, height: int) -> Sequence[Row]:
    """Health first, then in whose hands, how far, how fast, until when, and which run."""
    health = view.health
    line: Row = ((f" {health!s:<13}", health.tone),)
    parts = _progress(view)
    while parts and width_of(line) + sum(3 + width_of(part) for _, part in parts) > width:
        parts.pop()
    for _, part in sorted(parts):
        line = (*line, ("   ", "plain"), *part)
    return [spread(line, ((f"{view.snapshot.name} ", "dim"),), width)]


def _progress(view: View) -> list[tuple[int, Row]]:
    """(place in the line, part), the most important first: a narrow terminal drops the last."""
    status = view.status
    if status is None:
        return []
    total = count(status.total_steps) if status.total_steps else ""
    steps = f"step {count(status.step):>{len(total)}}" + (f" / {total}" if total else "")
    parts: list[tuple[int, Row]] = [(1, row((steps, "strong"))), (0, row((f"{status.mode.value:<6}", "accent")))]
    if total:
        parts.append((2, row(f"{min(100, 100 * status.step // status.total_steps):>3} %")))
    if view.read_only:
        parts.append((5, row(("read-only", "warn"))))
    if not status.phase.ended:
        known = status.phase not in (Phase.STARTING, Phase.SETUP) and status.eta_seconds > 0
        parts.append((4, row(f"ETA {duration(status.eta_seconds if known else math.nan):>8}")))
        parts.append((3, row(f"{metric(status.tokens_per_second or math.nan):>5} tok/s")))
    return parts


def facts(view: View, width: int, height: int) -> Sequence[Row]:
    """The status line: what is going on, and whether all that is written is safe."""
    status = view.status
    parts: list[Piece] = []
    if view.snapshot.trouble:
        parts.append((f"✗ {view.snapshot.trouble}", "bad"))
    if view.snapshot.recorded:
        return [fit(_joined([*parts, (view.snapshot.recorded, "plain")]), width)]
    if status is None:
        if not parts:
            parts.append(("waiting for the first sign of life of the run", "dim"))
        return [fit(_joined(parts), width)]
    if status.durability != "ok":
        parts.append((f"▲ durability {status.durability}", "bad"))
    if status.commands_problem and not status.phase.ended:
        parts.append((f"✗ commands are not read: {status.commands_problem}", "bad"))
    progress = f": {status.progress}" if status.progress and not status.phase.ended else ""
    lost = view.silence > HEARTBEAT_SECONDS and not status.phase.ended
    parts.append((f"{'last seen ' if lost else ''}{PHASES[status.phase]}{progress}", "plain"))
    if status.phase.ended and status.exit_code:
        parts.append((f"exit code {status.exit_code}", "warn"))
    parts.append((f"timeline {status.timeline}", "dim"))
    if status.durability == "ok":
        parts.append(("durability ok", "dim"))
    if status.lr_factor != 1:
        parts.append((f"rate ×{status.lr_factor:g}", "accent"))
    if status.restarts:
        parts.append((plural(status.restarts, "restart"), "warn"))
    if status.guard_share:
        parts.append((f"guard {100 * status.guard_share:.1f} %", "dim"))
    if view.snapshot.around.screens > 1:
        parts.append((f"{view.snapshot.around.screens} screens", "accent"))
    hosts = len({rank.told.host for rank in view.snapshot.around.ranks})
    where = f" on {count(hosts)} hosts" if hosts > 1 else f" on {status.host}" if status.host else ""
    parts.append((f"{plural(status.world, 'rank')}{where}", "dim"))
    while len(parts) > 1 and width_of(_joined(parts)) > width:
        parts.remove(next((part for part in reversed(parts) if part[1] == "dim"), parts[-1]))
    return [fit(_joined(parts), width)]


def _joined(parts: Sequence[Piece]) -> Row:
    line: list[Piece] = [(" ", "plain")]
    for index, part in enumerate(parts):
        line += [("  ·  ", "faint")] * bool(index) + [part]
    return tuple(line)


def message(view: View, width: int, height: int) -> Sequence[Row]:
    text, tone = view.message
    return [fit(((f" {text}", tone),), width)]


def low_footer(view: View, width: int, height: int) -> Sequence[Row]:
    """Of a terminal without a row for messages: what there is to say, else the keys."""
    return message(view, width, height) if view.message[0] else footer(view, width, height)


def footer(view: View, width: int, height: int) -> Sequence[Row]:
    status = view.status
    controls = not view.read_only and not (status is not None and status.phase.ended)
    return [
        keys.footer(width, controls=controls, asking=bool(status is not None and status.question), focus=view.focus)
    ]
