"""What happened in a run: from a run directory to a typed report.

Works on a run that is young, running, ended or dead: whatever the journal does not say is left out
of the report. Text that came from outside is cleaned here, so that every way of showing the report
is safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from guardrail.core.files import as_float
from guardrail.core.records import Event, Status
from guardrail.core.text import clean
from guardrail.report.costs import with_costs
from guardrail.report.incident_builder import IncidentBuilder, asked_for
from guardrail.report.journal_entries import whole
from guardrail.report.model import CheckpointLine, CommandRecord, Report, Restart
from guardrail.report.quarantine import count_left_out
from guardrail.rundir.journal import last_turn, outcome_of
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory


def build(run: RunDirectory) -> Report:
    """Raises RunDirectoryError only where the metrics cannot be understood."""
    events = run.events()
    status = run.read_status()
    first = next((e for e in events if e.kind == "started"), None)
    state, last = _state(run, status, events)
    seen = [e.time for e in events] + ([status.heartbeat] if status else [])
    began = events[0].time if events else (status.started if status else 0.0)
    metrics = _metrics(run)
    reached = max((e.step for e in events), default=0)
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
        left_out=count_left_out(events),
        incidents=tuple(with_costs(run, events, IncidentBuilder().of(events))),
        by_person=tuple(asked_for(events)),
        commands=tuple(_answered(e) for e in events if e.kind == "command"),
        checkpoints=tuple(_checkpoints(events)),
        restarts=tuple(_restarts(run, events)),
        troubles=tuple(_troubles(events)),
        **{key: value for key, value in metrics.items() if key != "step"},
    )


# -- how it stands


def _state(
    run: RunDirectory, status: Status | None, events: list[Event]
) -> tuple[str, Event | None]:
    """The state, and the event that is the last word, if there is one."""
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
    """Numbers of the present timeline, read in one pass over six columns."""
    view = run.metrics(["step", "loss", "verdict", "eval_loss"])
    if not len(view):
        return {}
    steps, losses, verdicts, evals = view.array[view.current()].T
    applied = verdicts == 0
    found: dict[str, Any] = {"applied": int(applied.sum()), "rejected": int((~applied).sum())}
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
    """The last word on each; a save that failed has no name and is told each time."""
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
            step=whole(data["cp_step"])
            if "cp_step" in data
            else known.step
            if known
            else event.step,
            state=clean(str(data.get("state", "")), 40),
            bytes=whole(data.get("bytes")) or (known.bytes if known else 0),
            reason=clean(str(data.get("reason") or ""), 400),
            time=event.time,
        )
    return list(found.values())


def _restarts(run: RunDirectory, events: list[Event]) -> Iterator[Restart]:
    """What was lost is counted in applied rows: those that the restart itself abandoned."""
    restarts = [e for e in events if e.kind == "restarted"]
    if not restarts:
        return
    view = run.metrics().sensible()
    steps, timelines, verdicts = (view.column(name) for name in ("step", "timeline", "verdict"))
    for event in restarts:
        before = timelines < event.timeline
        last = timelines[before].max() if before.any() else -1
        reached = steps[(timelines == last) & (verdicts == 0)]
        lost = int(reached.max()) - event.step if len(reached) else 0
        check = next(
            (e for e in events if e.seq > event.seq and e.kind in ("resume_check", "restarted")),
            None,
        )
        parts = check.data if check is not None and check.kind == "resume_check" else {}
        yield Restart(
            step=event.step,
            timeline=event.timeline,
            time=event.time,
            checkpoint=clean(str(event.data.get("checkpoint") or ""), 120),
            steps_lost=max(0, lost),
            sentence=clean(event.message or str(event.data.get("reason") or ""), 400),
            differs=tuple(
                clean(f"{part}: {outcome}", 200)
                for part, outcome in parts.items()
                if outcome != "ok"
            ),
        )


def _troubles(events: Iterable[Event]) -> Iterator[str]:
    for event in events:
        if event.kind in ("hung", "ranks_failed", "durability", "note") and event.message:
            yield clean(event.message, 400)
