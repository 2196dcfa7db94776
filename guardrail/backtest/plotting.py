"""Draws a recorded run: each signal, its normal range, and the alarms. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardrail.backtest.importers.recorded_log import Log
from guardrail.backtest.result import NOTE, BacktestResult
from guardrail.core.packages import require_package

POINTS = 4000  # most points of a curve: the smallest and the largest value of each segment
LARGEST = 1e30  # of a threshold that is drawn
COLOURS = {
    NOTE: "#9a9a9a",
    "skip": "#e08a00",
    "rollback": "#c62828",
    "pause": "#c62828",
    "halt": "#6a1b9a",
}


def require_matplotlib() -> None:
    """Raise MissingPackage if matplotlib is not installed."""
    require_package("matplotlib", "--plot")


class BandRecorder:
    """Records the bands while a log is judged, at most `POINTS` of them."""

    def __init__(self, log: Log) -> None:
        self._every = max(1, len(log) // POINTS)
        self.rows: list[int] = []
        self.bands: list[dict[str, tuple[float, float]]] = []

    def __call__(self, row: int, bands: dict[str, tuple[float, float]]) -> None:
        if row % self._every == 0:
            self.rows.append(row)
            self.bands.append(bands)


def draw_run(
    log: Log, result: BacktestResult, bands: BandRecorder, folder: str, *, svg: bool = False
) -> Path:
    """Write FOLDER/NAME.png or .svg and return its path. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    suffix = "png"
    if svg:
        suffix = "svg"
    path = target / f"{_file_name(log.path)}.{suffix}"
    signals = [name for name, column in log.columns.items() if column.missing < len(column)]
    figure, axes = pyplot.subplots(
        len(signals),
        1,
        sharex=True,
        squeeze=False,
        figsize=(12, 1 + 2.6 * len(signals)),
        layout="constrained",
    )
    try:
        for axis, signal in zip(axes[:, 0], signals, strict=True):
            _draw_signal(axis, log, result, bands, signal)
        label = "step"
        if _has_steps_back(log.steps):
            label = "record"
        axes[-1, 0].set_xlabel(label)
        figure.suptitle(log.path, fontsize=9)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
    return path


def _draw_signal(
    axis: Any, log: Log, result: BacktestResult, bands: BandRecorder, signal: str
) -> None:
    x: Sequence[int] = log.steps
    if _has_steps_back(log.steps):
        x = range(len(log))  # a curve over steps would overlap itself
    rows, values = _thin_out(log, signal)
    axis.plot([x[row] for row in rows], values, color="#1f77b4", linewidth=0.7)
    known = [
        (row, of_row[signal])
        for row, of_row in zip(bands.rows, bands.bands, strict=True)
        if signal in of_row
    ]
    if known:
        at = [x[row] for row, _ in known]
        axis.fill_between(
            at,
            [low for _, (low, _) in known],
            [min(high, LARGEST) for _, (_, high) in known],
            color="#1f77b4",
            alpha=0.15,
        )
    for verdict, colour in COLOURS.items():
        mine = [
            alarm.row
            for alarm in result.alarms
            if alarm.signal == signal and alarm.verdict == verdict
        ]
        drawn = [(x[row], log.columns[signal].get(row)) for row in mine]
        finite = [
            (step, value) for step, value in drawn if value is not None and math.isfinite(value)
        ]
        if mine:
            steps = [step for step, _ in finite] or [x[row] for row in mine[:1]]
            heights = [value for _, value in finite] or [0.0]
            axis.scatter(
                steps, heights, s=14, color=colour, label=f"{verdict} ({len(mine)})", zorder=3
            )
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and len(positive) > 0.9 * len(values):
        axis.set_yscale("log")
        axis.set_ylim(0.9 * min(positive), 1.2 * max(positive))
    axis.set_ylabel(signal)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper right", fontsize=7)


def _thin_out(log: Log, signal: str) -> tuple[list[int], list[float]]:
    """Return (rows, values): the smallest and the largest value of each segment, in order.

    So every spike of a long run is drawn.
    """
    column = log.columns[signal]
    every = max(1, 2 * len(log) // POINTS)
    rows: list[int] = []
    for begin in range(0, len(log), every):
        inside = [row for row in range(begin, min(begin + every, len(log))) if column.present[row]]
        finite = [row for row in inside if math.isfinite(column.values[row])]
        if finite:
            ends = {
                min(finite, key=column.values.__getitem__),
                max(finite, key=column.values.__getitem__),
            }
            rows += sorted(ends)
        elif inside:
            rows.append(inside[0])  # NaN: a gap in the line
    return rows, [column.values[row] for row in rows]


def _has_steps_back(steps: Sequence[int]) -> bool:
    return any(b < a for a, b in itertools.pairwise(steps))


def _file_name(path: str) -> str:
    """Return a file name for a log: its folder and its stem, or the run inside a file."""
    parts = [part for part in Path(path).parts[-2:] if part not in ("/", "..", ".")]
    plain = "-".join(parts)
    plain = re.sub(r"\.(csv|tsv|jsonl|json|log|txt|wandb)(?=$|#)", "", plain)
    return re.sub(r"[^\w.+=@-]+", "-", plain)[-120:] or "run"
