"""Finds what interrupted a run: failed and hung ranks, disk problems, restarts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.files import as_int
from guardrail.core.text import clean_text
from guardrail.report.model import Fault, Restart
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

# kind of a journal line -> kind of the fault
_RANK_FAULTS = {
    "rank_failed": "rank failed",
    "rank_hung": "rank hung",
}
_DISK = ("disk",)
_TURNS = ("started", "restarted", "ended")


def find_faults(events: Sequence[Event]) -> tuple[Fault, ...]:
    """Return failed and hung ranks, and failed writes to the disk.

    Consecutive faults with the same message are one, until the run has continued.
    """
    found: list[Fault] = []
    step = 0
    for event in events:
        fault = _read_fault(event, step)
        if event.kind in _DISK:
            step = max(step, event.step)
        else:
            step = event.step
        if fault is None:
            _resolve_faults(found, event, step)
        elif found and _is_same(found[-1], fault):
            found[-1] = msgspec.structs.replace(found[-1], count=found[-1].count + 1)
        else:
            found.append(fault)
    return tuple(found)


def _is_same(before: Fault, now: Fault) -> bool:
    return before.resolved_step is None and (before.kind, before.message) == (now.kind, now.message)


def _read_fault(event: Event, step: int) -> Fault | None:
    data = event.data
    if event.kind in _RANK_FAULTS:
        return Fault(
            kind=_RANK_FAULTS[event.kind],
            step=event.step,
            time=event.time,
            message=clean_text(event.message, 400),
            rank=as_int(data.get("rank", -1)),
            host=clean_text(str(data.get("host") or ""), 80),
            log=clean_text(str(data.get("log") or ""), 200),
        )
    if event.kind in _DISK and data.get("state") != "ok":
        # The recorder has no step while it cannot write.
        message = clean_text(str(data.get("reason") or event.message), 400)
        return Fault(kind="disk failing", step=event.step or step, time=event.time, message=message)
    if event.kind == "checkpoint" and data.get("state") == "failed":
        message = clean_text(str(data.get("reason") or event.message), 400)
        return Fault(kind="checkpoint failed", step=event.step, time=event.time, message=message)
    return None


def _resolve_faults(faults: list[Fault], event: Event, step: int) -> None:
    """Mark the open faults that this event resolves."""
    if event.kind == "restarted":
        kinds: tuple[str, ...] = ("rank failed", "rank hung")
    elif event.kind in _DISK:
        kinds = ("disk failing",)
    elif event.kind == "checkpoint" and event.data.get("state") in ("candidate", "good"):
        kinds = ("checkpoint failed",)
    else:
        return
    for at, fault in enumerate(faults):
        if fault.resolved_step is None and fault.kind in kinds:
            faults[at] = msgspec.structs.replace(
                fault, resolved_step=step, seconds=max(0.0, event.time - fault.time)
            )


def find_restarts(run: RunDirectory, events: Sequence[Event]) -> Iterator[Restart]:
    """Give each restart with the applied rows that it discarded."""
    restarts = [event for event in events if event.kind == "restarted"]
    if not restarts:
        return
    view = run.metrics().sensible()
    for event in restarts:
        reached, took = _find_abandoned(view, event.timeline)
        repeated = reached > event.step
        lost = 0
        if len(reached):
            lost = int(reached.max()) - event.step
        measured = took[repeated & (took == took)]
        yield Restart(
            step=event.step,
            timeline=event.timeline,
            time=event.time,
            checkpoint=clean_text(str(event.data.get("checkpoint") or ""), 120),
            steps_lost=max(0, lost),
            sentence=clean_text(event.message or str(event.data.get("reason") or ""), 400),
            differs=_list_differences(events, event),
            seconds=float(measured.sum()) if len(measured) else math.nan,
            after=_find_ending(events, event),
        )


def _find_abandoned(view: MetricsView, timeline: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, seconds) of the applied rows of the last timeline before `timeline`."""
    names = ("step", "timeline", "verdict", "step_time")
    steps, timelines, verdicts, seconds = (view.column(name) for name in names)
    before = timelines < timeline
    last = -1
    if before.any():
        last = timelines[before].max()
    rows = (timelines == last) & (verdicts == 0)
    return steps[rows], seconds[rows]


def _list_differences(events: Sequence[Event], restart: Event) -> tuple[str, ...]:
    """Return the parts of the state that differ from the saved ones, by the check after the
    restart.
    """
    after = (e for e in events if e.seq > restart.seq and e.kind in ("resume_check", "restarted"))
    check = next(after, None)
    if check is None or check.kind != "resume_check":
        return ()
    return tuple(
        clean_text(f"{part}: {outcome}", 200)
        for part, outcome in check.data.items()
        if outcome != "ok"
    )


def _find_ending(events: Sequence[Event], restart: Event) -> str:
    """Return how the run had ended before this restart."""
    before = [e for e in events if e.seq < restart.seq and e.kind in (*_TURNS, *_RANK_FAULTS)]
    if not before:
        return ""
    last = before[-1]
    if last.kind in _RANK_FAULTS:
        return "failure"
    if last.kind == "ended":
        return clean_text(str(last.data.get("phase") or "ended"), 40)
    return ""
