"""The signals of a run as SVG for one HTML file: band, applied steps, discarded steps, rejected
tries.

A curve has at most two points per column of pixels: the smallest and the largest value in it. So a
million steps make a small file, and every spike is visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guardrail.core.events.decisions import RolledBack, Undone
from guardrail.core.events.event import Event
from guardrail.core.records.signals import EMBED_GRAD_NORM, GRAD_NORM, LOSS
from guardrail.core.records.verdicts import Action
from guardrail.decide.recovery import expected_loss
from guardrail.report.incident import Incident
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

WIDTH, HEIGHT = 960, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 22  # margins in pixels
LOGARITHMIC = 20.0  # an axis is logarithmic if the largest value is this multiple of the median
MAX_TRIES = 500  # most rejected tries that are drawn per signal
LARGEST = 1e300  # drawn value: float64 can still hold the width of the axis
NAMES = {
    LOSS: "loss (nats a token)",
    GRAD_NORM: "gradient norm",
    EMBED_GRAD_NORM: "gradient norm of the embedding",
}


@dataclass(frozen=True)
class Axis:
    """Data -> pixels; `low` and `high` are logarithms where it is logarithmic."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        import numpy as np

        seen = values
        if self.log:
            seen = np.log10(np.maximum(values, 10.0**self.low))
        share = (np.clip(seen, self.low, self.high) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def value_at(self, place: float) -> float:
        """Return the data value at a place in pixels, within the margins."""
        seen = self.low + (place - self.begin) / (self.end - self.begin) * (self.high - self.low)
        if self.log:
            return 10.0**seen
        return seen

    def choose_ticks(self) -> list[float]:
        """Return at most seven round numbers."""
        if self.log:
            decades = range(math.ceil(self.low), math.floor(self.high) + 1)
            found = [10.0**decade for decade in decades]
            return found[:: max(1, -(-len(found) // 6))] or [10.0 ** ((self.low + self.high) / 2)]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def draw_curves(
    run: RunDirectory, events: Iterable[Event], incidents: Sequence[Incident] = ()
) -> list[tuple[str, str]]:
    """Return (name, SVG) of each signal that the run measured. The loss shows its trend before each
    incident.
    """
    import numpy as np

    view = run.metrics().sensible()
    if not len(view):
        return []
    steps = np.asarray(view.column("step"))
    present = view.current()
    marks = [
        (float(event.to_step), event.kind)
        for event in events
        if isinstance(event, RolledBack | Undone) and event.to_step is not None
    ]
    low, high = float(np.nanmin(steps)), float(np.nanmax(steps))
    across = Axis(low, max(high, low + 1), LEFT, WIDTH - RIGHT)
    found = []
    for signal in (LOSS, GRAD_NORM, EMBED_GRAD_NORM):
        if np.isfinite(view.column(signal)).any():
            heading = []
            if signal == LOSS:
                heading = list(list_trends(incidents, high))
            found.append(
                (NAMES[signal], _draw_signal(view, signal, across, present, marks, heading))
            )
    return found


def list_trends(
    incidents: Iterable[Incident], last: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give (steps, losses) of the trend before each incident.

    It begins at the first loss that the trend was fitted to. It ends where the incident was over,
    or at step `last` if it is open.
    """
    import numpy as np

    for incident in incidents:
        if incident.curve is not None:
            begin, end = (
                max(1, incident.onset - incident.curve.count),
                min(last, incident.closed_step or last),
            )
            if begin < end:
                steps = np.linspace(begin, end, min(100, int(end - begin) + 1))
                yield (
                    steps,
                    np.array([expected_loss(incident.curve, step) for step in steps.tolist()]),
                )


def _draw_signal(
    view: MetricsView,
    signal: str,
    across: Axis,
    present: np.ndarray,
    marks: list[tuple[float, str]],
    heading: list[tuple[np.ndarray, np.ndarray]],
) -> str:
    import numpy as np

    steps, values = np.asarray(view.column("step")), np.asarray(view.column(signal))
    applied = np.asarray(view.column("verdict")) == list(Action).index(Action.APPLY)
    unit = fit_vertical_axis(values[applied & np.isfinite(values)], values[np.isfinite(values)])
    up = replace(unit, begin=HEIGHT - BOTTOM, end=TOP)
    parts = [*_draw_frame(across, up)]
    base, top = (
        np.asarray(view.column(f"{signal}_baseline")),
        np.asarray(view.column(f"{signal}_threshold")),
    )
    known = present & applied & np.isfinite(base) & np.isfinite(top)
    parts += _draw_band(across, up, steps[known], base[known], top[known])
    for step, kind in marks:
        x = float(across(np.array(step)))
        parts.append(
            f'<line class="mark {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    gone = applied & ~present & np.isfinite(values)
    parts += _draw_line(
        "gone", across, up, steps[gone], values[gone], view.column("timeline")[gone]
    )
    here = applied & present & np.isfinite(values)
    parts += _draw_line("here", across, up, steps[here], values[here])
    for xs, ys in heading:
        parts += _draw_line("heading", across, up, xs, ys)
    tried = ~applied
    for x, y, finite in zip(
        across(steps[tried][-MAX_TRIES:]).tolist(),
        up(np.nan_to_num(values[tried][-MAX_TRIES:], nan=math.inf, posinf=math.inf)).tolist(),
        np.isfinite(values[tried][-MAX_TRIES:]).tolist(),
        strict=True,
    ):
        parts.append(
            f'<circle class="tried{"" if finite else " nan"}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
        )
    if signal == LOSS:
        held_out = np.asarray(view.column("eval_loss"))
        known = present & np.isfinite(held_out)
        for x, y in zip(across(steps[known]).tolist(), up(held_out[known]).tolist(), strict=True):
            parts.append(f'<circle class="eval" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{NAMES[signal]}">{"".join(parts)}</svg>'


def fit_vertical_axis(applied: np.ndarray, finite: np.ndarray) -> Axis:
    """Return a vertical axis from 1 at the bottom to 0 at the top.

    It shows all applied values. Other values get at most half of the height; larger ones are drawn
    at the top.
    """
    import numpy as np

    finite = np.clip(finite, -LARGEST, LARGEST)
    seen = finite
    if len(applied):
        seen = np.clip(applied, -LARGEST, LARGEST)
    low, most = float(seen.min()), float(seen.max())
    high = max(
        most, min(float(np.quantile(finite, 0.999)), most + max(most - low, 0.1 * abs(most)))
    )
    if low > 0 and high > LOGARITHMIC * float(np.median(seen)):
        return Axis(math.log10(low) - 0.05, math.log10(high) + 0.05, 1.0, 0.0, log=True)
    room = 0.05 * (high - low) or max(1e-9, abs(high)) * 0.05
    # a loss or a norm that is never negative has no axis below 0
    least = 0.0
    if not low >= 0:
        least = -math.inf
    return Axis(max(least, low - room), high + room, 1.0, 0.0)


def _draw_frame(across: Axis, up: Axis) -> Iterator[str]:
    import numpy as np

    for tick in up.choose_ticks():
        y = float(up(np.array(tick)))
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
    for tick in across.choose_ticks():
        x = float(across(np.array(tick)))
        yield f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:,.0f}</text>'


def _draw_band(
    across: Axis, up: Axis, steps: np.ndarray, base: np.ndarray, top: np.ndarray
) -> Iterator[str]:
    """Give the normal range as an area, from the baseline to the threshold."""
    if len(steps) < 2:
        return
    xs, lower, upper = across(steps), up(base), up(top)
    every = max(1, len(xs) // (WIDTH - LEFT - RIGHT))
    forth = [
        f"{x:.1f},{y:.1f}"
        for x, y in zip(xs[::every].tolist(), upper[::every].tolist(), strict=True)
    ]
    back = [
        f"{x:.1f},{y:.1f}"
        for x, y in zip(xs[::every].tolist(), lower[::every].tolist(), strict=True)
    ]
    yield f'<polygon class="band" points="{" ".join([*forth, *reversed(back)])}"/>'


def _draw_line(
    name: str,
    across: Axis,
    up: Axis,
    steps: np.ndarray,
    values: np.ndarray,
    parts: np.ndarray | None = None,
) -> Iterator[str]:
    """Give one polyline, or one for each of `parts`: the discarded timelines."""
    import numpy as np

    if parts is not None:
        for part in np.unique(parts).tolist():
            yield from _draw_line(name, across, up, steps[parts == part], values[parts == part])
        return
    if not len(steps):
        return
    xs, ys = across(steps), up(values)
    columns = np.floor(xs).astype(np.int64)
    firsts = np.flatnonzero(np.diff(columns, prepend=columns[0] - 1))
    points = []
    for begin, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(xs)], strict=True):
        ends = sorted(
            {begin + int(np.argmin(ys[begin:end])), begin + int(np.argmax(ys[begin:end]))}
        )
        points += [f"{xs[at]:.1f},{ys[at]:.1f}" for at in ends]
    yield f'<polyline class="{name}" points="{" ".join(points)}"/>'
