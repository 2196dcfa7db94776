"""Finds what interrupted a run: failed and hung ranks, disk problems, restarts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from guardrail.core.events.event import Event
from guardrail.core.events.faults import DiskChanged, RankFailed, RankFault, RankHung
from guardrail.core.events.run_state import (
    CheckpointChanged,
    Ended,
    Restarted,
    ResumeChecked,
    Started,
)
from guardrail.core.files import as_int
from guardrail.core.text import clean_text
from guardrail.report.model import Fault, Restart
from guardrail.rundir.metrics import MetricsView
from guardrail.rundir.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

_DISK_FAILING, _CHECKPOINT_FAILED = "disk failing", "checkpoint failed"  # kinds of faults


def find_faults(events: Sequence[Event]) -> tuple[Fault, ...]:
    """Return failed and hung ranks, and failed writes to the disk.

    Consecutive faults with the same message are one, until the run has continued.
    """
    found: list[Fault] = []
    step = 0
    for event in events:
        fault = _read_fault(event, step)
        if isinstance(event, DiskChanged):
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
    """Return the fault of a line; None: it is about none. `step`: of the line before it."""
    match event:
        case RankFailed() | RankHung():
            return Fault(
                kind=event.fault,
                step=event.step,
                time=event.time,
                message=clean_text(event.message, 400),
                rank=as_int(event.rank, -1),
                host=clean_text(event.host, 80),
                log=clean_text(event.log, 200),
            )
        case DiskChanged(is_ok=False):
            # The recorder has no step while it cannot write.
            return _make_write_fault(_DISK_FAILING, event, event.step or step)
        case CheckpointChanged(state="failed"):
            return _make_write_fault(_CHECKPOINT_FAILED, event, event.step)
    return None


def _make_write_fault(kind: str, event: DiskChanged | CheckpointChanged, step: int) -> Fault:
    message = clean_text(event.reason or event.message, 400)
    return Fault(kind=kind, step=step, time=event.time, message=message)


def _resolve_faults(faults: list[Fault], event: Event, step: int) -> None:
    """Mark the open faults that this event resolves."""
    kinds: tuple[str, ...] = ()
    match event:
        case Restarted():
            kinds = (RankFailed.fault, RankHung.fault)
        case DiskChanged():
            kinds = (_DISK_FAILING,)
        case CheckpointChanged(state="candidate" | "good"):
            kinds = (_CHECKPOINT_FAILED,)
    for at, fault in enumerate(faults):
        if fault.resolved_step is None and fault.kind in kinds:
            faults[at] = msgspec.structs.replace(
                fault, resolved_step=step, seconds=max(0.0, event.time - fault.time)
            )


def find_restarts(run: RunDirectory, events: Sequence[Event]) -> Iterator[Restart]:
    """Give each restart with the applied rows that it discarded."""
    restarts = [event for event in events if isinstance(event, Restarted)]
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
            checkpoint=clean_text(event.checkpoint, 120),
            steps_lost=max(0, lost),
            sentence=clean_text(event.message or event.reason, 400),
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
    after = (event for event in events if event.seq > restart.seq)
    check = next((event for event in after if isinstance(event, ResumeChecked | Restarted)), None)
    if not isinstance(check, ResumeChecked):
        return ()
    differences = check.differences.items()
    return tuple(clean_text(f"{part}: {outcome}", 200) for part, outcome in differences)


def _find_ending(events: Sequence[Event], restart: Event) -> str:
    """Return how the run had ended before this restart."""
    for event in reversed(events):
        if event.seq >= restart.seq:
            continue
        match event:
            case RankFault():
                return "failure"
            case Ended():
                return clean_text(event.phase or "ended", 40)
            case Started() | Restarted():
                return ""
    return ""
