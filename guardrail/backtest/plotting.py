"""A recorded run as a picture: each signal, the band that its baseline allowed, and what was said.
Needs matplotlib.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardrail.backtest.backtest import NOTE, Result
from guardrail.backtest.importers.recorded_log import Log
from guardrail.core.packages import require_package

POINTS = 4000  # columns in which a long run is drawn; of each the least and the greatest value
COLOURS = {
    NOTE: "#9a9a9a",
    "skip": "#e08a00",
    "rollback": "#c62828",
    "pause": "#c62828",
    "halt": "#6a1b9a",
}


def require() -> None:
    """Raise MissingPackage if matplotlib is not installed."""
    require_package("matplotlib", "--plot")


class Track:
    """Takes the bands down while a log is judged, for as many rows as can be told apart."""

    def __init__(self, log: Log) -> None:
        self._every = max(1, len(log) // POINTS)
        self.rows: list[int] = []
        self.bands: list[dict[str, tuple[float, float]]] = []

    def __call__(self, row: int, bands: dict[str, tuple[float, float]]) -> None:
        if row % self._every == 0:
            self.rows.append(row)
            self.bands.append(bands)


def draw(log: Log, result: Result, track: Track, folder: str, *, svg: bool = False) -> Path:
    """Write FOLDER/NAME.png or .svg and return its path. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{_name(log.path)}.{'svg' if svg else 'png'}"
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
            _panel(axis, log, result, track, signal)
        axes[-1, 0].set_xlabel("record" if _goes_back(log.steps) else "step")
        figure.suptitle(log.path, fontsize=9)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
    return path


def _panel(axis: Any, log: Log, result: Result, track: Track, signal: str) -> None:
    # Where the step goes back, a curve over steps would fold onto itself.
    x: Sequence[int] = range(len(log)) if _goes_back(log.steps) else log.steps
    rows, values = _thinned(log, signal)
    axis.plot([x[row] for row in rows], values, color="#1f77b4", linewidth=0.7)
    known = [
        (row, bands[signal])
        for row, bands in zip(track.rows, track.bands, strict=True)
        if signal in bands
    ]
    if known:
        at = [x[row] for row, _ in known]
        axis.fill_between(
            at,
            [low for _, (low, _) in known],
            [_ceiling(high) for _, (_, high) in known],
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


def _thinned(log: Log, signal: str) -> tuple[list[int], list[float]]:
    """The least and the greatest value of each stretch, in order: no spike of a long run is lost
    between two points.
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
            rows.append(inside[0])  # NaN: the line breaks
    return rows, [column.values[row] for row in rows]


def _goes_back(steps: Sequence[int]) -> bool:
    return any(b < a for a, b in itertools.pairwise(steps))


def _ceiling(value: float) -> float:
    return min(value, 1e30)


def _name(path: str) -> str:
    """A file name that says which log this is: its folder and its stem, or the run inside a
    file.
    """
    parts = [part for part in Path(path).parts[-2:] if part not in ("/", "..", ".")]
    plain = "-".join(parts)
    plain = re.sub(r"\.(csv|tsv|jsonl|json|log|txt|wandb)(?=$|#)", "", plain)
    return re.sub(r"[^\w.+=@-]+", "-", plain)[-120:] or "run"
