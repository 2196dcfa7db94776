"""What an incident has cost, by the rows and the journal of its run: only what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.events.decisions import RolledBack, Undone
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import Ended, Paused, Restarted, Resumed
from guardrail.core.records.signals import LOSS
from guardrail.core.records.verdicts import Action
from guardrail.decide.recovery import expected_loss
from guardrail.decide.timelines import TimelineIndex
from guardrail.report.incident import Cost, Effect, Incident
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

WITHIN_NOISE = "within the noise"  # as `Effect.worth`


def add_costs(
    run: RunDirectory, events: list[Event], incidents: list[Incident]
) -> Iterator[Incident]:
    """Give the incidents, each with its cost and its effect as measured in rows and journal."""
    if not incidents:
        return
    view = run.metrics(["step", "timeline", "verdict", "step_time", LOSS])
    parked = _measure_waiting(events)
    for incident in incidents:
        cost = _measure_cost(incident, view, events, parked.get(incident.number, 0.0))
        yield msgspec.structs.replace(incident, cost=cost, effect=judge_effect(incident, cost))


def judge_effect(incident: Incident, cost: Cost) -> Effect | None:
    """Return whether the gain of an incident's actions is larger than their cost.

    A difference below the noise of a single loss counts as neither. None without a trend, without a
    loss to compare with it, or without a loss after the incident.
    """
    offset, noise = incident.measured.get("offset", math.nan), incident.measured.get("noise", 0.0)
    if not math.isfinite(cost.excess) or not math.isfinite(offset):
        return None
    gain = cost.excess - offset - cost.price
    worth = "no"
    if gain > 0:
        worth = "yes"
    if abs(gain) <= noise:
        worth = WITHIN_NOISE
    return Effect(excess=cost.excess, offset=offset, price=cost.price, noise=noise, worth=worth)


def _measure_cost(
    incident: Incident, view: MetricsView, events: list[Event], parked: float
) -> Cost:
    """Return what an incident cost: the rows that its rollbacks discarded, its rejected tries, and
    the seconds of both.
    """
    import numpy as np

    steps, timelines, verdicts, seconds, losses = view.array.T
    discarded = np.zeros(len(view), dtype=bool)
    tried = np.zeros(len(view), dtype=bool)
    for action in incident.actions:
        if action.new_timeline >= 0 and action.to_step is not None:
            before = TimelineIndex()
            before.add_events(
                event
                for event in events
                if event.time <= action.time and not _begins(event, action.new_timeline)
            )
            present = before.current(steps, timelines) & (timelines < action.new_timeline)
            discarded |= present & (steps > action.to_step) & (verdicts == 0)
        if not action.action.startswith("would"):
            tried |= (timelines == action.timeline) & (steps == action.step + 1) & (verdicts != 0)
    took = seconds[discarded | tried]
    tried &= ~_applied_after_all(tried & (verdicts == list(Action).index(Action.RETRY)), view)
    lost = sum(action.steps_lost for action in incident.actions)
    onset = max(1, incident.onset)
    curve = incident.curve
    excess, price = math.nan, 0.0
    if curve is not None:
        bad = (discarded | tried) & (steps >= onset) & np.isfinite(losses)
        above = [
            loss - expected_loss(curve, step)
            for step, loss in zip(steps[bad], losses[bad], strict=True)
        ]
        if above:
            excess = float(np.median(above))
        price = expected_loss(curve, onset) - expected_loss(curve, onset + lost)
    measured = math.nan
    if len(took):
        measured = float(np.nansum(took))
    return Cost(
        steps=lost,
        seconds=measured,
        parked=parked,
        rejected=int(tried.sum()),
        excess=excess,
        price=price,
    )


def _begins(event: Event, timeline: int) -> bool:
    """Return whether the line says that it began this timeline."""
    return isinstance(event, RolledBack | Undone | Restarted) and event.new_timeline == timeline


def _applied_after_all(retried: np.ndarray, view: MetricsView) -> np.ndarray:
    """Return the mask of retries whose batch was then applied with the same loss."""
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


def _measure_waiting(events: Iterable[Event]) -> dict[int, float]:
    """Return number of an incident -> seconds for which its question waited for an answer."""
    found: dict[int, float] = {}
    since: Paused | None = None
    for event in events:
        if since is not None and isinstance(event, Resumed | Ended | RolledBack | Restarted):
            number = since.incident or 0
            found[number] = found.get(number, 0.0) + max(0.0, event.time - since.time)
            since = None
        elif isinstance(event, Paused):
            since = event
    return found
