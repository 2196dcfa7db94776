"""What an incident has cost, by the rows and the journal of its run: only what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.records import LOSS, Action, Event
from guardrail.decide.recovery import expected
from guardrail.decide.timelines import TimelineIndex
from guardrail.report.incident import Cost, Incident
from guardrail.report.journal_entries import whole
from guardrail.rundir.run_directory import MetricsView, RunDirectory

if TYPE_CHECKING:
    import numpy as np


def with_costs(
    run: RunDirectory, events: list[Event], incidents: list[Incident]
) -> Iterator[Incident]:
    """The incidents, each with what its rows and its journal lines say that it took."""
    if not incidents:
        return
    view = run.metrics(["step", "timeline", "verdict", "step_time", LOSS])
    parked = _parked(events)
    for incident in incidents:
        yield msgspec.structs.replace(
            incident, cost=_cost(incident, view, events, parked.get(incident.number, 0.0))
        )


def _cost(incident: Incident, view: MetricsView, events: list[Event], parked: float) -> Cost:
    """Rows that its rollbacks gave up, and tries that were rejected, with the seconds that both
    have taken.
    """
    import numpy as np

    steps, timelines, verdicts, seconds, losses = view.array.T
    given_up = np.zeros(len(view), dtype=bool)
    tried = np.zeros(len(view), dtype=bool)
    for deed in incident.deeds:
        if deed.new_timeline >= 0 and deed.to_step is not None:
            before = TimelineIndex()
            before.add_events(
                e
                for e in events
                if e.time <= deed.time and e.data.get("new_timeline") != deed.new_timeline
            )
            present = before.current(steps, timelines) & (timelines < deed.new_timeline)
            given_up |= present & (steps > deed.to_step) & (verdicts == 0)
        if not deed.action.startswith("would"):
            tried |= (timelines == deed.timeline) & (steps == deed.step + 1) & (verdicts != 0)
    took = seconds[given_up | tried]
    tried &= ~_applied_after_all(tried & (verdicts == list(Action).index(Action.RETRY)), view)
    lost, onset, curve = (
        sum(deed.steps_lost for deed in incident.deeds),
        max(1, incident.onset),
        incident.curve,
    )
    excess, price = math.nan, 0.0
    if curve is not None:
        bad = (given_up | tried) & (steps >= onset) & np.isfinite(losses)
        above = [
            loss - expected(curve, step) for step, loss in zip(steps[bad], losses[bad], strict=True)
        ]
        excess = float(np.median(above)) if above else math.nan
        price = expected(curve, onset) - expected(curve, onset + lost)
    return Cost(
        steps=lost,
        seconds=float(np.nansum(took)) if len(took) else math.nan,
        parked=parked,
        rejected=int(tried.sum()),
        excess=excess,
        price=price,
    )


def _applied_after_all(retried: np.ndarray, view: MetricsView) -> np.ndarray:
    """Of tries whose batch was formed again, those in which it was applied then, with the same
    loss.
    """
    import numpy as np

    steps, timelines, verdicts, _, losses = view.array.T
    found = np.zeros_like(retried)
    for row in np.flatnonzero(retried):
        same = (
            (steps == steps[row])
            & (timelines == timelines[row])
            & (verdicts == 0)
            & (losses == losses[row])
        )
        found[row] = same[row:].any()
    return found


def _parked(events: Iterable[Event]) -> dict[int, float]:
    """Seconds for which each incident's question waited: number -> seconds."""
    found: dict[int, float] = {}
    since: Event | None = None
    for event in events:
        if since is not None and event.kind in ("resumed", "ended", "rollback", "restarted"):
            number = whole(since.data.get("incident"))
            found[number] = found.get(number, 0.0) + max(0.0, event.time - since.time)
            since = None
        elif event.kind == "paused":
            since = event
    return found
