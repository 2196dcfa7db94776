"""What the lines around the panes say: functions of (view, width, height) to rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.core.format import (
    clean_and_shorten,
    format_count,
    format_elapsed,
    format_plural,
    format_short_count,
)
from guardrail.tui.draw.lines import (
    Piece,
    Row,
    fit_row,
    make_row,
    row_width,
    spread_row,
    text_width,
)
from guardrail.tui.model.active_factors import format_factors
from guardrail.tui.model.health import PHASES, STARTING, format_disk_state
from guardrail.tui.model.view import View
from guardrail.tui.screens import keys

_NAMED_FROM = 100  # cells from which on the name of the run counts more than its speed
# cells of a shortened name that are kept free there, and of one worth showing
_NAME, _NAME_LEAST = 16, 12


def header_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Health first, then in whose hands, how far, how fast, until when, and which run."""
    health = view.health
    line: Row = ((f" {health!s:<13}", health.tone),)
    parts = _progress(view)
    name = f"{view.snapshot.name} "
    least = 2 + min(_NAME, text_width(name)) if width >= _NAMED_FROM else 0
    while parts and row_width(line) + sum(3 + row_width(part) for _, part in parts) > width - least:
        parts.pop()
    for _, part in sorted(parts):
        line = (*line, ("   ", "plain"), *part)
    room = width - row_width(line) - 2
    right = (
        make_row((name, "dim"))
        if room >= text_width(name)
        else (*fit_row(make_row((name.strip(), "dim")), room - 1), (" ", "dim"))
    )
    return [spread_row(line, right if room > _NAME_LEAST else (), width)]


def _progress(view: View) -> list[tuple[int, Row]]:
    """(place in the line, part), the most important first: a narrow terminal drops the last."""
    status = view.status
    damage = (
        [(1, make_row((f"✗ {', '.join(view.snapshot.damage)}", "bad")))]
        if view.snapshot.damage
        else []
    )
    if status is None:
        return damage
    total = format_count(status.total_steps) if status.total_steps else ""
    steps = f"step {format_count(status.step):>{len(total)}}" + (f" / {total}" if total else "")
    parts: list[tuple[int, Row]] = [(2, make_row((steps, "strong"))), *damage]
    parts.append((0, make_row((f"{status.mode.value:<6}", "accent"))))
    if total:
        parts.append((3, make_row(f"{min(100, 100 * status.step // status.total_steps):>3} %")))
    if view.read_only:
        parts.append((6, make_row(("read-only", "warn"))))
    if not status.phase.ended:
        measured = view.responds and status.phase not in STARTING
        eta = status.eta_seconds if measured and status.eta_seconds > 0 else math.nan
        speed = status.tokens_per_second if measured and status.tokens_per_second else math.nan
        parts.append((5, make_row(f"ETA {format_elapsed(eta):>8}")))
        parts.append((4, make_row(f"{format_short_count(speed):>5} tok/s")))
    return parts


def status_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """The status line: what is going on, and whether all that is written is safe."""
    status = view.status
    parts: list[Piece] = []
    if view.snapshot.problem:
        parts.append((f"✗ {view.snapshot.problem}", "bad"))
    parts += [(f"✗ {text}", "bad") for text in view.snapshot.damage]
    if view.snapshot.recorded:
        return [fit_row(_joined([*parts, (view.snapshot.recorded, "plain")]), width)]
    if status is None:
        if not parts:
            parts.append(("waiting for the first sign of life of the run", "dim"))
        return [fit_row(_joined(parts), width)]
    if status.disk != "ok":
        parts.append((f"▲ {format_disk_state(status)}", "bad"))
    if status.commands_problem and not status.phase.ended:
        parts.append((f"✗ commands are not read: {status.commands_problem}", "bad"))
    if status.unresolved is not None:
        parts.append((f"▲ {clean_and_shorten(status.unresolved.sentence(), 120)}", "warn"))
    progress = f": {status.progress}" if status.progress and not status.phase.ended else ""
    parts.append(
        (f"{'' if view.responds else 'last seen '}{PHASES[status.phase]}{progress}", "plain")
    )
    if status.phase.ended and status.exit_code:
        parts.append((f"exit code {status.exit_code}", "warn"))
    parts.append((f"timeline {status.timeline}", "dim"))
    if status.disk == "ok":
        parts.append(("disk ok", "dim"))
    held = format_factors(view.snapshot.story.factors, status.step + 1)
    if status.lr_factor != 1 and not any(text.startswith("rate ") for text in held):
        held = [f"rate ×{status.lr_factor:g}", *held]
    parts += [(text, "accent") for text in held]
    if status.restarts:
        parts.append((format_plural(status.restarts, "restart"), "warn"))
    if status.guard_share:
        parts.append((f"guard {100 * status.guard_share:.1f} %", "dim"))
    if view.snapshot.around.screens > 1:
        parts.append((f"{view.snapshot.around.screens} screens", "accent"))
    hosts = len({rank.status.host for rank in view.snapshot.around.ranks})
    where = (
        f" on {format_count(hosts)} hosts"
        if hosts > 1
        else f" on {status.host}"
        if status.host
        else ""
    )
    parts.append((f"{format_plural(status.world, 'rank')}{where}", "dim"))
    while len(parts) > 1 and row_width(_joined(parts)) > width:
        parts.remove(next((part for part in reversed(parts) if part[1] == "dim"), parts[-1]))
    return [fit_row(_joined(parts), width)]


def _joined(parts: Sequence[Piece]) -> Row:
    line: list[Piece] = [(" ", "plain")]
    for index, part in enumerate(parts):
        line += [("  ·  ", "faint")] * bool(index) + [part]
    return tuple(line)


def message_rows(view: View, width: int, height: int) -> Sequence[Row]:
    text, tone = view.message
    return [fit_row(((f" {text}", tone),), width)]


def low_footer_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Of a terminal without a row for messages: what there is to say, else the keys."""
    return (
        message_rows(view, width, height) if view.message[0] else footer_rows(view, width, height)
    )


def footer_rows(view: View, width: int, height: int) -> Sequence[Row]:
    status = view.status
    controls = (
        not view.read_only and not view.lost and not (status is not None and status.phase.ended)
    )
    return [
        keys.footer_keys(
            width,
            controls=controls,
            asking=bool(status is not None and status.question),
            focus=view.focus,
        )
    ]
