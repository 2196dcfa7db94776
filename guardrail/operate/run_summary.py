"""A run in one line: its state, its progress, its loss in a few points.

There may be hundreds of runs, so little of each is read: the status and some rows of the metrics.
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
from guardrail.core.records.signals import LOSS
from guardrail.core.records.status import Phase, Status
from guardrail.core.text import clean_text
from guardrail.rundir.metrics import read_layout
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_search import list_runs

IsAlive = Callable[[RunDirectory, Status], bool | None]
_LOOK_BACK = 8  # rows in which the newest applied update is looked for


@dataclass(frozen=True)
class RunSummary:
    """One run. Its texts hold no control characters.

    Attributes:
        state: its phase. "lost": it has not ended, and no process responds. "unknown": not known
            yet whether a process responds. "new": it has no status. "asking": it waits for an
            answer.
        loss: the newest one that was measured; None without one.
        unresolved: the incident that is not over, as "LOSS +8.5 since 400"; "" without one, and
            while the guard handles it.
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


def summarize_run(run: RunDirectory, is_alive: IsAlive) -> RunSummary:
    """Return one run as it is now.

    Args:
        is_alive: whether a process works on a run that has not ended; None: not known yet.
    """
    status = run.known_status()
    known = status or Status(run="", phase=Phase.STARTING)
    state = _find_state(run, status, is_alive)
    is_going = state not in ("new", "lost", "unknown") and not known.phase.ended
    tokens_per_second, eta_seconds = 0.0, 0.0
    if is_going:
        tokens_per_second, eta_seconds = known.tokens_per_second, known.eta_seconds
    loss = None
    losses = read_losses(run, 1)
    if losses and math.isfinite(losses[-1]):
        loss = losses[-1]
    unresolved = ""
    if known.unresolved is not None:
        unresolved = clean_text(known.unresolved.headline(), 80)
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
        tokens_per_second=tokens_per_second,
        eta_seconds=eta_seconds,
        loss=loss,
        unresolved=unresolved,
    )


def _find_state(run: RunDirectory, status: Status | None, is_alive: IsAlive) -> str:
    """Return the state of a run; see `RunSummary.state`."""
    if status is None:
        return "new"
    if not status.phase.ended:
        alive = is_alive(run, status)
        if alive is None:
            return "unknown"
        if not alive:
            return "lost"
        if status.question:
            return "asking"
    return status.phase.value


def summarize_runs(root: str | os.PathLike[str], is_alive: IsAlive) -> list[RunSummary]:
    """Return all runs of a folder, newest first."""
    return [summarize_run(run, is_alive) for run in list_runs(root)]


def read_losses(run: RunDirectory, points: int) -> list[float]:
    """Return at most `points` losses of the present timeline, at even distances.

    The last loss is included. NaN and Inf are returned as they are. Rejected updates and abandoned
    timelines do not count. Only the rows asked for are read, so a million rows cost no more than a
    thousand. Returns [] for what cannot be read.
    """
    with contextlib.suppress(OSError, RunDirectoryError, ValueError):
        layout = read_layout(run.path / "metrics.json")
        if layout is None or not {"step", LOSS} <= set(layout.columns):
            return []
        columns = layout.columns
        step_at, loss_at, verdict_at = columns.index("step"), columns.index(LOSS), -1
        if "verdict" in columns:
            verdict_at = columns.index("verdict")
        losses: list[float] = []
        earliest = math.inf
        for row in reversed(_read_rows(run, len(columns), points)):
            step = row[step_at]
            is_applied = verdict_at < 0 or row[verdict_at] == 0
            # A step that a later row has made again is abandoned.
            if is_applied and 1 <= step < earliest:
                earliest = step
                losses.append(row[loss_at])
        return losses[::-1][-points:]
    return []


def _read_rows(run: RunDirectory, columns: int, points: int) -> list[tuple[float, ...]]:
    """Return `points` rows at even distances up to the last complete one.

    For one point, returns the last rows, in which the newest applied one is looked for.
    """
    record = struct.Struct(f"<{columns}d")
    with open_file(run.metrics_path) as file:
        descriptor = file.fileno()
        total = os.fstat(descriptor).st_size // record.size
        if points == 1:
            places = list(range(max(0, total - _LOOK_BACK), total))
        else:
            wanted = min(points, total)
            distances = {round(index * total / wanted) for index in range(wanted)}
            places = sorted({max(0, total - 1 - distance) for distance in distances})
        data = [os.pread(descriptor, record.size, place * record.size) for place in places]
    return [record.unpack(part) for part in data if len(part) == record.size]
