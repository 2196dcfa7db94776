"""The loss of a run in a few lines of plain ASCII, for a terminal, a pager or a mail: what
svg_curves.py draws as SVG.

*  applied       .  discarded by a rollback       x  rejected, at the top where it is not finite
-  the loss trend before an incident (guardrail.decide.recovery)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import Action
from guardrail.report.incident import Incident
from guardrail.report.svg_curves import fit_vertical_axis, list_trends
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

WIDTH, HEIGHT = 68, 10  # characters
LEAST = 2  # rows that a curve needs
APPLIED, DISCARDED, REJECTED, TREND = "*.x-"


def draw_chart(run: RunDirectory, incidents: Iterable[Incident]) -> list[str]:
    """Return lines of at most 80 characters; none if there is no loss to draw."""
    import numpy as np

    view = run.metrics().sensible()
    steps, verdicts, losses = (np.asarray(view.column(name)) for name in ("step", "verdict", LOSS))
    finite, applied = np.isfinite(losses), verdicts == list(Action).index(Action.APPLY)
    if finite.sum() < LEAST:
        return []
    up = fit_vertical_axis(losses[applied & finite], losses[finite])
    first, last = float(np.nanmin(steps)), float(np.nanmax(steps))
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]

    def put_marks(mark: str, xs: np.ndarray, ys: np.ndarray) -> None:
        columns = (
            np.clip((xs - first) / max(1.0, last - first) * (WIDTH - 1), 0, WIDTH - 1)
            .round()
            .astype(int)
        )
        rows = (
            (up(np.nan_to_num(ys, nan=math.inf, posinf=1e300)) * (HEIGHT - 1)).round().astype(int)
        )
        for row, column in set(zip(rows.tolist(), columns.tolist(), strict=True)):
            grid[row][column] = mark

    for xs, ys in list_trends(incidents, last):
        put_marks(TREND, xs, ys)
    present = view.current()
    put_marks(DISCARDED, steps[applied & ~present & finite], losses[applied & ~present & finite])
    put_marks(APPLIED, steps[applied & present & finite], losses[applied & present & finite])
    put_marks(REJECTED, steps[~applied], losses[~applied])
    return list(
        _frame_grid(grid, high=up.value_at(0.0), low=up.value_at(1.0), first=first, last=last)
    )


def _frame_grid(
    grid: list[list[str]], *, high: float, low: float, first: float, last: float
) -> Iterator[str]:
    labels = {0: f"{high:.3g}", len(grid) - 1: f"{low:.3g}"}
    for number, row in enumerate(grid):
        yield f"{labels.get(number, ''):>9} |{''.join(row)}".rstrip()
    begin, end = f"{first:,.0f}", f"{last:,.0f}"
    yield f"{'':9} +{'-' * WIDTH}"
    yield f"{'':11}{begin}{end:>{WIDTH - len(begin)}}"
    drawn = {mark for row in grid for mark in row}
    words = {
        APPLIED: "applied",
        DISCARDED: "discarded",
        REJECTED: "rejected",
        TREND: "trend",
    }
    yield f"{'':9}loss by step: " + ", ".join(
        f"{mark} {word}" for mark, word in words.items() if mark in drawn
    )
