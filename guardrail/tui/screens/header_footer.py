"""The header, the status line, the message line and the footer, as rows. Pure."""

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
from guardrail.core.records.status import Status
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

_NAMED_FROM = 100  # cells from which on the name of the run comes before its speed
# cells of a shortened name that are kept free there, and of one worth showing
_NAME, _NAME_LEAST = 16, 12


def header_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Return health first, then mode, step, speed, remaining time, and the name of the run."""
    health = view.health
    line: Row = ((f" {health!s:<13}", health.tone),)
    parts = _progress_parts(view)
    name = f"{view.snapshot.name} "
    least = 2 + min(_NAME, text_width(name)) if width >= _NAMED_FROM else 0
    while parts and row_width(line) + sum(3 + row_width(part) for _, part in parts) > width - least:
        parts.pop()
    for _, part in sorted(parts):
        line = (*line, ("   ", "plain"), *part)
    room = width - row_width(line) - 2
    return [spread_row(line, _name_row(name, room), width)]


def _name_row(name: str, room: int) -> Row:
    """Return the name of the run, shortened where it has no room; "" where too little is left."""
    if room <= _NAME_LEAST:
        return ()
    if room >= text_width(name):
        return make_row((name, "dim"))
    return (*fit_row(make_row((name.strip(), "dim")), room - 1), (" ", "dim"))


def _progress_parts(view: View) -> list[tuple[int, Row]]:
    """Return (place in the line, part), the most important first: narrow terminals drop the last."""
    status = view.status
    damage: list[tuple[int, Row]] = []
    if view.snapshot.damage:
        damage.append((1, make_row((f"✗ {', '.join(view.snapshot.damage)}", "bad"))))
    if status is None:
        return damage
    parts: list[tuple[int, Row]] = [(2, make_row((_step_text(status), "strong"))), *damage]
    parts.append((0, make_row((f"{status.mode.value:<6}", "accent"))))
    if status.total_steps:
        percent = min(100, 100 * status.step // status.total_steps)
        parts.append((3, make_row(f"{percent:>3} %")))
    if view.read_only:
        parts.append((6, make_row(("read-only", "warn"))))
    if not status.phase.ended:
        eta = speed = math.nan
        if view.responds and status.phase not in STARTING:
            eta = status.eta_seconds if status.eta_seconds > 0 else math.nan
            speed = status.tokens_per_second or math.nan
        parts.append((5, make_row(f"ETA {format_elapsed(eta):>8}")))
        parts.append((4, make_row(f"{format_short_count(speed):>5} tok/s")))
    return parts


def _step_text(status: Status) -> str:
    if not status.total_steps:
        return f"step {format_count(status.step)}"
    total = format_count(status.total_steps)
    return f"step {format_count(status.step):>{len(total)}} / {total}"


def status_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Return the status line: what the run does now, and whether everything is written to disk."""
    status, snapshot = view.status, view.snapshot
    parts = [(f"✗ {text}", "bad") for text in (snapshot.problem, *snapshot.damage) if text]
    if snapshot.recorded:
        parts.append((snapshot.recorded, "plain"))
    elif status is not None:
        parts += _status_parts(view, status)
        while len(parts) > 1 and row_width(_joined(parts)) > width:
            parts.remove(next((part for part in reversed(parts) if part[1] == "dim"), parts[-1]))
    elif not parts:
        parts.append(("waiting for the first status of the run", "dim"))
    return [fit_row(_joined(parts), width)]


def _status_parts(view: View, status: Status) -> list[Piece]:
    """Return the parts of the status line; dim ones are dropped first where it is narrow."""
    parts: list[Piece] = _problem_parts(status)
    phase = PHASES[status.phase]
    if not view.responds:
        phase = f"last seen {phase}"
    if status.progress and not status.phase.ended:
        phase += f": {status.progress}"
    parts.append((phase, "plain"))
    if status.phase.ended and status.exit_code:
        parts.append((f"exit code {status.exit_code}", "warn"))
    parts.append((f"timeline {status.timeline}", "dim"))
    if status.disk == "ok":
        parts.append(("disk ok", "dim"))
    parts += [(text, "accent") for text in _factor_texts(view, status)]
    if status.restarts:
        parts.append((format_plural(status.restarts, "restart"), "warn"))
    if status.guard_share:
        parts.append((f"guard {100 * status.guard_share:.1f} %", "dim"))
    if view.snapshot.around.screens > 1:
        parts.append((f"{view.snapshot.around.screens} screens", "accent"))
    parts.append((_ranks_text(view, status), "dim"))
    return parts


def _problem_parts(status: Status) -> list[Piece]:
    parts: list[Piece] = []
    if status.disk != "ok":
        parts.append((f"▲ {format_disk_state(status)}", "bad"))
    if status.commands_problem and not status.phase.ended:
        parts.append((f"✗ commands are not read: {status.commands_problem}", "bad"))
    if status.unresolved is not None:
        parts.append((f"▲ {clean_and_shorten(status.unresolved.sentence(), 120)}", "warn"))
    return parts


def _factor_texts(view: View, status: Status) -> list[str]:
    texts = format_factors(view.snapshot.story.factors, status.step + 1)
    if status.lr_factor != 1 and not any(text.startswith("rate ") for text in texts):
        texts.insert(0, f"rate ×{status.lr_factor:g}")  # older journals do not name it
    return texts


def _ranks_text(view: View, status: Status) -> str:
    text = format_plural(status.world, "rank")
    hosts = len({rank.status.host for rank in view.snapshot.around.ranks})
    if hosts > 1:
        return f"{text} on {format_count(hosts)} hosts"
    return f"{text} on {status.host}" if status.host else text


def _joined(parts: Sequence[Piece]) -> Row:
    line: list[Piece] = [(" ", "plain")]
    for index, part in enumerate(parts):
        if index:
            line.append(("  ·  ", "faint"))
        line.append(part)
    return tuple(line)


def message_rows(view: View, width: int, height: int) -> Sequence[Row]:
    text, tone = view.message
    return [fit_row(((f" {text}", tone),), width)]


def low_footer_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Return the message, else the keys: for a terminal without a row for messages."""
    if view.message[0]:
        return message_rows(view, width, height)
    return footer_rows(view, width, height)


def footer_rows(view: View, width: int, height: int) -> Sequence[Row]:
    """Return the keys that do something now."""
    status = view.status
    ended = status is not None and status.phase.ended
    return [
        keys.footer_keys(
            width,
            controls=not (view.read_only or view.lost or ended),
            asking=bool(status is not None and status.question),
            focus=view.focus,
        )
    ]
