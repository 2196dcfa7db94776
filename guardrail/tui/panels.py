"""What the panels beside the charts say: functions of (view, width, height) to rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guardrail.records import Finding, Phase, SnapshotInfo, Status
from guardrail.tui import keys
from guardrail.tui.chart import spark_row
from guardrail.tui.format import brief, clock, count, duration, metric, plural, size
from guardrail.tui.health import HEARTBEAT_SECONDS
from guardrail.tui.lines import Piece, Row, fit, row, spread, title, width_of, wrap
from guardrail.tui.log import Line
from guardrail.tui.scales import short
from guardrail.tui.story import Incident, left_out
from guardrail.tui.view import CHARTS, View

PHASES = {
    Phase.STARTING: "starting",
    Phase.SETUP: "setting up",
    Phase.STEP: "training",
    Phase.EVAL: "evaluating",
    Phase.SAVE: "saving",
    Phase.ROLLBACK: "rolling back",
    Phase.PAUSED: "paused",
    Phase.FINISHED: "finished",
    Phase.STOPPED: "stopped",
    Phase.HALTED: "halted by the guard",
    Phase.FAILED: "failed",
}


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
    where = f" on {status.host}" if status.host else ""
    parts.append((f"{plural(status.world, 'rank')}{where}", "dim"))
    return [fit(_joined(parts), width)]


def _joined(parts: Sequence[Piece]) -> Row:
    line: list[Piece] = [(" ", "plain")]
    for index, part in enumerate(parts):
        line += [("  ·  ", "faint")] * bool(index) + [part]
    return tuple(line)


def message(view: View, width: int, height: int) -> Sequence[Row]:
    text, tone = view.message
    return [fit(((f" {text}", tone),), width)]


def footer(view: View, width: int, height: int) -> Sequence[Row]:
    status = view.status
    controls = not view.read_only and not (status is not None and status.phase.ended)
    return [keys.footer(width, controls=controls, asking=bool(status is not None and status.question))]


# -- incidents


def incidents(view: View, width: int, height: int) -> Sequence[Row]:
    """The newest in full, older ones in two lines each."""
    found = view.snapshot.story.incidents
    rows = [title("incidents", width, right=((str(len(found)), "dim"),) if found else ())]
    if not found:
        return [*rows, ((" none", "dim"),)]
    for index, incident in enumerate(found):
        lines = _incident(incident, width, full=index == 0)
        if len(rows) + len(lines) > height and index:
            break
        rows += lines
    return rows


def newest(view: View, width: int, height: int) -> Sequence[Row]:
    """The newest incident in two rows, for a screen without a side."""
    found = view.snapshot.story.incidents
    if not found:
        return [((" no incidents", "dim"),)]
    return [_head(found[0], width), *_evidence(found[0], width)[:1]]


def _incident(incident: Incident, width: int, *, full: bool) -> list[Row]:
    rows = [_head(incident, width)]
    evidence = _evidence(incident, width)
    rows += evidence[:4] if full else evidence[:1]
    if full and incident.documents:
        more = incident.documents_total - len(incident.documents)
        names = ", ".join(incident.documents) + (f" and {more:,} more" if more > 0 else "")
        lines = wrap(names, width - 5)
        rows += [row((f"    {line}", "dim")) for line in lines[:3]]
        if len(lines) > 3:
            rows[-1] = fit(row((f"    {lines[2]} …", "dim")), width)
    return rows


def _head(incident: Incident, width: int) -> Row:
    number = f"#{incident.number}" if incident.number > 0 else "–"
    state: Piece = ("▲ open", "warn") if incident.open else ("✓ over", "good")
    left: Row = ((f" {number:<3} ", "strong"), (f"step {count(incident.step)}  ", "plain"), state)
    return fit((*left, (f"  {incident.deed}", "plain")), width)


def _evidence(incident: Incident, width: int) -> list[Row]:
    """Findings, then what was left out. The narrow view shows the first line only, so it holds both."""
    found = [_finding(finding) for finding in incident.findings[:3]]
    if data := left_out(incident):
        found.append(data)
    return [fit(row((f"    {text}", "plain")), width) for text in found]


def _finding(finding: Finding) -> str:
    """ "loss 2.31 → 11.5, score 41 over 8" """
    signal = brief(finding.signal, 40).replace("_", " ")
    where = f" on rank {', '.join(map(str, finding.ranks))}" if finding.ranks else ""
    if not math.isfinite(finding.value):
        return f"{signal}: {short(finding.value)}{where}"
    return (
        f"{signal} {short(finding.baseline)} → {short(finding.value)}{where}, "
        f"score {short(finding.score)} over {short(finding.threshold)}"
    )


# -- snapshots and checkpoints


def restorable(status: Status | None) -> list[SnapshotInfo]:
    """All states one can go back to, newest first; of the same step the memory first, since it is faster."""
    return sorted(status.snapshots, key=lambda s: (-s.step, s.tier != "memory")) if status else []


def glyph(info: SnapshotInfo) -> Piece:
    """Filled: good. Hollow: candidate. Triangle: suspect. Circles are in memory, squares on disk."""
    if info.state == "suspect":
        return "▲", "warn"
    filled = info.state == "good"
    return ("●" if filled else "○", "good") if info.tier == "memory" else ("■" if filled else "□", "good")


def checkpoints(view: View, width: int, height: int) -> Sequence[Row]:
    known = restorable(view.status)
    rows = [title("snapshots and checkpoints", width)]
    if not known:
        return [*rows, ((" none yet", "dim"),)]
    shown = known
    if len(known) > height - 1:
        # What is in memory comes and goes; the disk is what survives, so it is never squeezed out.
        disk = [s for s in known if s.tier == "disk"][: max(1, (height - 1) // 2)]
        memory = [s for s in known if s.tier != "disk"][: max(0, height - 1 - len(disk))]
        shown = sorted([*disk, *memory], key=lambda s: (-s.step, s.tier != "memory"))
    return rows + [fit(((" ", "plain"), *snapshot(info, view.now)), width) for info in shown]


def snapshot(info: SnapshotInfo, now: float) -> Row:
    """`● 1,280  memory        candidate   0:00:02`"""
    place = f"{info.tier} {size(info.bytes) if info.tier == 'disk' else ''}"
    tone = "warn" if info.state == "suspect" else "plain" if info.state == "good" else "dim"
    age = duration(now - info.time) if info.time else ""
    return (
        glyph(info),
        (f" {count(info.step):>9}  {place:<13}", "plain"),
        (f"{info.state:<10}", tone),
        (f"{age:>9}", "dim"),
    )


# -- log


def log(view: View, width: int, height: int) -> Sequence[Row]:
    """The newest lines of the journal, the last at the bottom."""
    rows: list[Row] = []
    for line in reversed(view.snapshot.story.lines):
        if len(rows) >= height - 1:
            break
        rows = log_rows(line, width) + rows
    return [title("journal", width), *rows[max(0, len(rows) - height + 1) :]]


def log_rows(line: Line, width: int) -> list[Row]:
    """One event, wrapped under its time."""
    head = f" {clock(line.time)} "
    texts = wrap(line.text, width - len(head) - 2)
    rows = [row((head, "dim"), (f"{line.mark} ", line.tone), (texts[0], "plain"))]
    return rows + [row((" " * (len(head) + 2), "plain"), (text, "plain")) for text in texts[1:]]


def sparks(view: View, width: int, height: int) -> Sequence[Row]:
    """The signals whose charts are hidden."""
    return [spark_row(view, signal, width) for signal in CHARTS if signal != view.big]
