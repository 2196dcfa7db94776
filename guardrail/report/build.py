"""Builds the report of a run: from a run directory to typed records.

It works for a new, running, ended or lost run. What the journal lacks, the report lacks too. Text
from outside is cleaned here, so every format of the report is safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from guardrail.core.config import is_custom_loop
from guardrail.core.events.event import Event
from guardrail.core.events.faults import DiskChanged, RankFault
from guardrail.core.events.run_state import (
    CheckpointChanged,
    CommandAnswered,
    Ended,
    Note,
    Restarted,
    Started,
)
from guardrail.core.records.status import Phase, Status
from guardrail.core.text import clean_text
from guardrail.report.costs import add_costs
from guardrail.report.incident import Incident
from guardrail.report.incident_builder import IncidentBuilder, list_user_actions
from guardrail.report.interruptions import find_faults, find_restarts
from guardrail.report.model import CheckpointLine, CommandRecord, Fault, Report, Restart
from guardrail.report.quarantine import count_skipped
from guardrail.report.skipped_files import find_data_folder, group_by_file
from guardrail.rundir.journal import last_turn, outcome_of
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory

_PROBLEMS = (RankFault, DiskChanged, Note)


def build_report(run: RunDirectory) -> Report:
    """Return the report of a run.

    Raises: RunDirectoryError: the metrics cannot be understood.
    """
    events = run.events()
    status = run.read_status()
    known = status or Status(run=run.name, phase=Phase.STARTING)
    state, last = _find_state(run, status, events)
    metrics = _read_metrics(run)
    reached = int(metrics.pop("step", max((e.step for e in events), default=0)))
    if status is not None:
        reached = status.step
    passed = metrics.pop("passed", 0)
    mode = ""
    if status is not None:
        mode = status.mode.value
    folder = find_data_folder(run)
    incidents = _gather_incidents(run, events, folder)
    restarts = tuple(find_restarts(run, events))
    faults = find_faults(events)
    return Report(
        run=clean_text(run.name, 120),
        path=clean_text(str(run.path)),
        state=state,
        step=reached,
        total_steps=known.total_steps,
        timeline=max((e.timeline for e in events), default=0),
        exit_code=_exit_code(status, last),
        reason=_final_reason(last),
        mode=mode,
        tokens=_count_tokens(known, events),
        guard_share=known.guard_share,
        unresolved=known.unresolved.sentence() if known.unresolved else "",
        samples_skipped=count_skipped(events),
        samples_read=max(passed, known.cursor),
        seconds_lost=_seconds_lost(incidents, restarts, faults),
        incidents=incidents,
        by_person=tuple(list_user_actions(events)),
        commands=tuple(_read_command(e) for e in events if isinstance(e, CommandAnswered)),
        checkpoints=tuple(_list_checkpoints(events)),
        restarts=restarts,
        troubles=_list_messages(events, _PROBLEMS),
        faults=faults,
        notes=_list_messages(events, (Note,)),
        data_folder=folder,
        question=clean_text(known.question, 400),
        custom_loop=is_custom_loop(run.path / "config.toml"),
        **_find_machine(known, events),
        **_measure_time(status, events),
        **metrics,
    )


# -- how it stands


def _find_machine(status: Status, events: list[Event]) -> dict[str, Any]:
    """Return host and number of ranks, from the first line of the run or from its status."""
    first = next((event for event in events if isinstance(event, Started)), None)
    if first is None:
        return {"world": status.world}
    return {"host": clean_text(first.host or status.host, 80), "world": first.world}


def _count_tokens(status: Status, events: list[Event]) -> int:
    """Return the label tokens of the applied updates; 0: the loop did not count them.

    `step.finish` without `tokens` counts one per rank. Real batches have more.
    """
    worlds = [event.world for event in events if isinstance(event, (Started, Restarted))]
    uncounted = status.step * max([status.world, *worlds])
    if status.tokens <= uncounted:
        return 0
    return status.tokens


def _measure_time(status: Status | None, events: list[Event]) -> dict[str, Any]:
    """Return when the run began, and the seconds from then to its last sign of life."""
    seen = [event.time for event in events]
    if status is not None:
        if not seen:
            seen.append(status.started)
        seen.append(status.heartbeat)
    began = 0.0
    if seen:
        began = seen[0]
    return {"started": began, "seconds": max(0.0, max(seen, default=began) - began)}


def _find_state(
    run: RunDirectory, status: Status | None, events: list[Event]
) -> tuple[str, Ended | None]:
    """Return the state, and the event of the final message if there is one."""
    turn = last_turn(events)
    if isinstance(turn, Ended):
        phase = turn.phase
        if not phase and status is not None:
            phase = status.phase.value
        return clean_text(phase or "ended", 40), turn
    if status is None and turn is None:
        return "new", None
    if status is not None and status.phase.ended:
        return status.phase.value, None
    if status is None:
        is_running = run.lock_holder() is not None
    else:
        is_running = is_alive(run, status)
    if is_running:
        return "running", None
    return "lost", None


def _final_reason(last: Ended | None) -> str:
    """Return the reason of the final message, or ""."""
    if last is None:
        return ""
    return clean_text(last.reason or last.message, 600)


def _exit_code(status: Status | None, last: Ended | None) -> int | None:
    if last is not None and last.exit_code is not None:
        return last.exit_code
    if status is not None:
        return status.exit_code
    if last is not None:
        outcome = outcome_of(last)
        if outcome is not None:
            return outcome[1].value
    return None


def _read_metrics(run: RunDirectory) -> dict[str, Any]:
    """Return numbers of the present timeline. Reads only the columns that they need, once."""
    view = run.metrics(["step", "loss", "verdict", "eval_loss", "last"])
    if not len(view):
        return {}
    lasts = view.array[:, 4]
    lasts = lasts[(lasts > 0) & (lasts < 2**53)]
    steps, losses, verdicts, evals, _ = view.array[view.current()].T
    applied = verdicts == 0
    found: dict[str, Any] = {"applied": int(applied.sum()), "rejected": int((~applied).sum())}
    found["passed"] = 0
    if len(lasts):
        found["passed"] = int(lasts.max())
    if applied.any():
        found |= {"loss": float(losses[applied][-1]), "step": int(steps[applied][-1])}
    held_out = evals[evals == evals]
    if len(held_out):
        found["eval_loss"] = float(held_out[-1])
    return found


# -- the rest


def _read_command(event: CommandAnswered) -> CommandRecord:
    return CommandRecord(
        id=clean_text(event.id, 128),
        command=clean_text(event.command, 40),
        value=_find_value(event),
        who=clean_text(event.who or "", 120),
        step=event.step,
        time=event.time,
        effect=clean_text(event.effect, 40),
        reason=clean_text(event.reason, 400),
    )


def _find_value(event: CommandAnswered) -> float:
    """Return the number of a command: 0 if the line has none, NaN if it cannot be read."""
    if event.value is not None:
        return event.value
    if "value" in event.data:
        return math.nan
    return 0.0


def _list_checkpoints(events: Iterable[Event]) -> list[CheckpointLine]:
    """Return each checkpoint with its last state. A failed save has no name, so each one is listed."""
    found: dict[str, CheckpointLine] = {}
    for event in events:
        if not isinstance(event, CheckpointChanged):
            continue
        name = clean_text(event.name, 120)
        before = found.get(name)
        known = None
        if before is not None and name:
            known = before
        found[name or f"seq {event.seq}"] = CheckpointLine(
            name=name,
            step=_checkpoint_step(event, known),
            state=clean_text(event.state, 40),
            bytes=_checkpoint_bytes(event, known),
            reason=clean_text(event.reason, 400),
            time=event.time,
        )
    return list(found.values())


def _checkpoint_step(event: CheckpointChanged, known: CheckpointLine | None) -> int:
    if event.cp_step is not None:
        return event.cp_step
    if known is not None:
        return known.step
    return event.step


def _checkpoint_bytes(event: CheckpointChanged, known: CheckpointLine | None) -> int:
    if known is not None and not event.bytes:
        return known.bytes
    return event.bytes


def _gather_incidents(run: RunDirectory, events: list[Event], folder: str) -> tuple[Incident, ...]:
    found = add_costs(run, events, IncidentBuilder().add_events(events))
    return tuple(
        msgspec.structs.replace(incident, files=group_by_file(incident, folder))
        for incident in found
    )


def _seconds_lost(
    incidents: Iterable[Incident], restarts: Iterable[Restart], faults: Iterable[Fault]
) -> float:
    """Return the seconds lost by incidents, failed ranks and repeated steps; NaN if none is known."""
    seconds = [incident.cost.total_seconds for incident in incidents]
    seconds += [restart.seconds for restart in restarts]
    seconds += [fault.seconds for fault in faults if fault.kind.startswith("rank")]
    measured = [one for one in seconds if math.isfinite(one)]
    if measured:
        return sum(measured)
    return math.nan


def _list_messages(events: Iterable[Event], classes: tuple[type[Event], ...]) -> tuple[str, ...]:
    return tuple(
        clean_text(event.message, 400)
        for event in events
        if isinstance(event, classes) and event.message
    )
