"""What one line says of a run: its state, how far it is, its loss in a few points. Reads little of
each, for there may be hundreds: the status, and some rows of the metrics.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from guardrail.core.errors import RunDirectoryError
from guardrail.core.files import open_file
from guardrail.core.records import LOSS, Phase, Status
from guardrail.core.text import clean_text
from guardrail.rundir.metrics import read_layout
from guardrail.rundir.run_directory import RunDirectory, list_runs

Alive = Callable[[RunDirectory, Status], bool | None]


@dataclass(frozen=True)
class RunSummary:
    """One run. Texts are clean.

    Attributes:
        state: its phase; "lost" if it has not ended and nobody keeps its status fresh, "unknown"
            while that takes another look, "new" without a status, "asking" while it is parked with
            a question.
        unresolved: the incident that is not over, in a few words, as "LOSS +8.5 since 400"; ""
            without one, and while the guard deals with it.
        loss: the newest one that was measured; None without one.
    """

    run: str
    path: str
    state: str
    step: int
    total_steps: int
    exit_code: int | None
    heartbeat: float
    host: str
    mode: str
    tokens_per_second: float
    eta_seconds: float
    loss: float | None
    unresolved: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def glance(run: RunDirectory, alive: Alive) -> RunSummary:
    """One run as it is now.

    Args:
        alive: whether somebody works on a run whose status has not ended; None while that is not
        known.
    """
    status = run.known_status()
    known = status or Status(run="", phase=Phase.STARTING)
    state = "new" if status is None else status.phase.value
    if status is not None and not status.phase.ended:
        lives = alive(run, status)
        if not lives:
            state = "unknown" if lives is None else "lost"
        elif status.question:
            state = "asking"
    losses = loss_points(run, 1)
    going = state not in ("new", "lost", "unknown") and not known.phase.ended
    return RunSummary(
        run=clean_text(run.name, 120),
        path=str(run.path),
        state=state,
        step=known.step,
        total_steps=known.total_steps,
        exit_code=known.exit_code,
        heartbeat=known.heartbeat,
        host=clean_text(known.host, 80),
        mode=known.mode.value,
        tokens_per_second=known.tokens_per_second if going else 0.0,
        eta_seconds=known.eta_seconds if going else 0.0,
        loss=losses[-1] if losses and math.isfinite(losses[-1]) else None,
        unresolved=clean_text(known.unresolved.headline(), 80)
        if known.unresolved is not None
        else "",
    )


def glances(root: str | os.PathLike[str], alive: Alive) -> list[RunSummary]:
    """All runs under a root, newest first."""
    return [glance(run, alive) for run in list_runs(root)]


def loss_points(run: RunDirectory, points: int) -> list[float]:
    """At most `points` losses of the present at even distances, the last one included; NaN and Inf
    as they are.

    Rejected updates and abandoned stretches are no part of it. Only the rows asked for are read: a
    million cost no more than a thousand. What cannot be read is no reason to fail.
    """
    with contextlib.suppress(OSError, RunDirectoryError, ValueError):
        layout = read_layout(run.path / "metrics.json")
        if layout is None or not {"step", LOSS} <= set(layout.columns):
            return []
        rows = _rows(run, len(layout.columns), points)
        where = {name: layout.columns.index(name) for name in ("step", LOSS)}
        verdict = layout.columns.index("verdict") if "verdict" in layout.columns else -1
        found: list[float] = []
        earliest = math.inf
        for row in reversed(rows):  # what a later row has run again is abandoned
            step = row[where["step"]]
            if 1 <= step < earliest and (verdict < 0 or row[verdict] == 0):
                earliest = step
                found.append(row[where[LOSS]])
        return found[::-1][-points:]
    return []


def _rows(run: RunDirectory, columns: int, points: int) -> list[tuple[float, ...]]:
    """Rows at even distances up to the last complete one."""
    record = struct.Struct(f"<{columns}d")
    with open_file(run.metrics_path) as file:
        descriptor = file.fileno()
        total = os.fstat(descriptor).st_size // record.size
        wanted = min(points, total)
        # The last `points` rows at distance total / wanted; of one point it is the last row, or the
        # one before it that was applied.
        places = sorted(
            {max(0, total - 1 - round(index * total / wanted)) for index in range(wanted)}
        )
        if points == 1:
            places = list(range(max(0, total - _LOOK_BACK), total))
        data = [os.pread(descriptor, record.size, place * record.size) for place in places]
    return [record.unpack(part) for part in data if len(part) == record.size]


_LOOK_BACK = 8  # rows in which the newest applied update is looked for
