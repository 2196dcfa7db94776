"""What happened in a run: from a run directory to a typed report.

Works on a run that is young, running, ended or lost: the report lacks what the journal lacks. Text
that came from outside is cleaned here, so that every way of showing the report is safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from guardrail.core.files import as_float
from guardrail.core.records import Event, Status
from guardrail.core.text import clean
from guardrail.report.costs import with_costs
from guardrail.report.incident import Incident
from guardrail.report.incident_builder import IncidentBuilder, asked_for
from guardrail.report.interruptions import find_faults, find_restarts
from guardrail.report.journal_entries import whole
from guardrail.report.model import CheckpointLine, CommandRecord, Fault, Report, Restart
from guardrail.report.quarantine import count_skipped
from guardrail.report.skipped_files import find_data_folder, group_by_file
from guardrail.rundir.journal import last_turn, outcome_of
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory

_TROUBLES = ("hung", "rank_hung", "ranks_failed", "rank_failed", "durability", "disk", "note")


def build(run: RunDirectory) -> Report:
    """Return the report of a run. Raises RunDirectoryError only where the metrics cannot be
    understood.
    """
    events = run.events()
    status = run.read_status()
    first = next((e for e in events if e.kind == "started"), None)
    state, last = _state(run, status, events)
    seen = [e.time for e in events] + ([status.heartbeat] if status else [])
    began = events[0].time if events else (status.started if status else 0.0)
    metrics = _metrics(run)
    reached = max((e.step for e in events), default=0)
    folder = find_data_folder(run)
    incidents = _incidents(run, events, folder)
    restarts = tuple(find_restarts(run, events))
    faults = find_faults(events)
    passed = metrics.pop("passed", 0)
    return Report(
        run=clean(run.name, 120),
        path=clean(str(run.path)),
        state=state,
        step=status.step if status else int(metrics.pop("step", reached)),
        total_steps=status.total_steps if status else 0,
        timeline=max((e.timeline for e in events), default=0),
        exit_code=_exit_code(status, last),
        reason=clean(str(last.data.get("reason") or last.message), 600) if last else "",
        started=began,
        seconds=max(0.0, max(seen, default=began) - began),
        host=clean(str(first.data.get("host") or (status.host if status else "")), 80)
        if first
        else "",
        world=whole(first.data.get("world")) if first else (status.world if status else 0),
        mode=status.mode.value if status else "",
        tokens=status.tokens if status else 0,
        guard_share=status.guard_share if status else 0.0,
        unresolved=status.unresolved.sentence() if status and status.unresolved else "",
        samples_skipped=count_skipped(events),
        samples_read=max(passed, status.cursor if status else 0),
        seconds_lost=_seconds_lost(incidents, restarts, faults),
        incidents=incidents,
        by_person=tuple(asked_for(events)),
        commands=tuple(_answered(e) for e in events if e.kind == "command"),
        checkpoints=tuple(_checkpoints(events)),
        restarts=restarts,
        troubles=_messages(events, _TROUBLES),
        faults=faults,
        notes=_messages(events, ("note",)),
        data_folder=folder,
        question=clean(status.question, 400) if status else "",
        **{key: value for key, value in metrics.items() if key != "step"},
    )


# -- how it stands


def _state(
    run: RunDirectory, status: Status | None, events: list[Event]
) -> tuple[str, Event | None]:
    """The state, and the event that is the final message, if there is one."""
    turn = last_turn(events)
    if turn is not None and turn.kind == "ended":
        phase = turn.data.get("phase")
        return clean(str(phase or (status.phase.value if status else "ended")), 40), turn
    if status is None:
        if turn is None:
            return "new", None
        return ("lost" if run.lock_holder() is None else "running"), None
    if status.phase.ended:
        return status.phase.value, None
    return ("running" if is_alive(run, status) else "lost"), None


def _exit_code(status: Status | None, last: Event | None) -> int | None:
    code = last.data.get("exit_code") if last else None
    if isinstance(code, int):
        return code
    if status is None and last is not None:
        outcome = outcome_of(last)
        return outcome[1].value if outcome is not None else None
    return status.exit_code if status else None


def _metrics(run: RunDirectory) -> dict[str, Any]:
    """Numbers of the present timeline, read in one pass over the columns that they need."""
    view = run.metrics(["step", "loss", "verdict", "eval_loss", "last"])
    if not len(view):
        return {}
    lasts = view.array[:, 4]
    lasts = lasts[(lasts > 0) & (lasts < 2**53)]
    steps, losses, verdicts, evals, _ = view.array[view.current()].T
    applied = verdicts == 0
    found: dict[str, Any] = {"applied": int(applied.sum()), "rejected": int((~applied).sum())}
    found["passed"] = int(lasts.max()) if len(lasts) else 0
    if applied.any():
        found |= {"loss": float(losses[applied][-1]), "step": int(steps[applied][-1])}
    held_out = evals[evals == evals]
    if len(held_out):
        found["eval_loss"] = float(held_out[-1])
    return found


# -- the rest


def _answered(event: Event) -> CommandRecord:
    data = event.data
    return CommandRecord(
        id=clean(str(data.get("id", "")), 128),
        command=clean(str(data.get("command", "")), 40),
        value=as_float(data.get("value", 0.0)),
        who=clean(str(data.get("who") or ""), 120),
        step=event.step,
        time=event.time,
        effect=clean(str(data.get("effect", "")), 40),
        reason=clean(str(data.get("reason") or ""), 400),
    )


def _checkpoints(events: Iterable[Event]) -> list[CheckpointLine]:
    """The last state of each; a save that failed has no name and is listed each time."""
    found: dict[str, CheckpointLine] = {}
    for event in events:
        if event.kind != "checkpoint":
            continue
        data = event.data
        name = clean(str(data.get("path") or "").rstrip("/").rsplit("/", 1)[-1], 120)
        before = found.get(name)
        known = before if before is not None and name else None
        found[name or f"seq {event.seq}"] = CheckpointLine(
            name=name,
            step=_checkpoint_step(event, known),
            state=clean(str(data.get("state", "")), 40),
            bytes=whole(data.get("bytes")) or (known.bytes if known else 0),
            reason=clean(str(data.get("reason") or ""), 400),
            time=event.time,
        )
    return list(found.values())


def _checkpoint_step(event: Event, known: CheckpointLine | None) -> int:
    if "cp_step" in event.data:
        return whole(event.data["cp_step"])
    return known.step if known is not None else event.step


def _incidents(run: RunDirectory, events: list[Event], folder: str) -> tuple[Incident, ...]:
    found = with_costs(run, events, IncidentBuilder().of(events))
    return tuple(
        msgspec.structs.replace(incident, files=group_by_file(incident, folder))
        for incident in found
    )


def _seconds_lost(
    incidents: Iterable[Incident], restarts: Iterable[Restart], faults: Iterable[Fault]
) -> float:
    """By incidents, by ranks that failed until the run continued, and by repeated steps."""
    seconds = [incident.cost.total_seconds for incident in incidents]
    seconds += [restart.seconds for restart in restarts]
    seconds += [fault.seconds for fault in faults if fault.kind.startswith("rank")]
    measured = [one for one in seconds if math.isfinite(one)]
    return sum(measured) if measured else math.nan


def _messages(events: Iterable[Event], kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        clean(event.message, 400) for event in events if event.kind in kinds and event.message
    )
