"""What happened in a run: from a run directory to a typed report, to JSON, to text, and to a
quarantine file.

Works on a run that is young, running, ended or dead: whatever the journal does not say is left out
of the report. Text that came from outside is cleaned here, so that every way of showing the report
is safe.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from guardrail.core.errors import RunDirectoryError
from guardrail.core.files import as_float, encode_json, read_file
from guardrail.core.records import Event, Record, Span, Status
from guardrail.core.text import clean
from guardrail.decide.undo import undone_spans
from guardrail.report.costs import with_costs
from guardrail.report.incident import Incident, IncidentAction
from guardrail.report.incident_builder import IncidentBuilder, asked_for
from guardrail.report.journal_entries import whole
from guardrail.rundir.journal import last_turn, outcome_of
from guardrail.rundir.liveness import is_alive
from guardrail.rundir.run_directory import RunDirectory, span_of


class CommandRecord(Record, frozen=True, kw_only=True):
    """A command and the journal's answer."""

    id: str
    command: str
    value: float
    who: str
    step: int
    time: float
    effect: str
    reason: str = ""


class CheckpointLine(Record, frozen=True, kw_only=True):
    """A checkpoint and what became of it."""

    name: str
    step: int
    state: str
    bytes: int = 0
    reason: str = ""
    time: float = 0.0


class Restart(Record, frozen=True, kw_only=True):
    """The run went on from `checkpoint`; `steps_lost` updates had been applied behind it and were
    made again.
    """

    step: int
    timeline: int
    time: float
    checkpoint: str
    steps_lost: int
    sentence: str
    differs: tuple[str, ...] = ()  # parts of the state that were not what had been saved


class Report(Record, frozen=True, kw_only=True):
    """Everything a person asks about a run afterwards.

    Attributes:
        state: phase of the last word; "running", or "lost" when there is none and nobody lives;
        "new".
        reason: the last word itself.
        seconds: from the first event to the last sign of life.
        applied, rejected: rows of the present timeline.
        unresolved: the incident that is not over, as a sentence; "" without one.
        left_out: samples in quarantine by this run, those of a file not counted; -1: the journal
        lacks the order.
        troubles: failed or hung ranks, degraded durability, notes: in the order of the journal.
    """

    run: str
    path: str
    state: str
    step: int
    total_steps: int
    timeline: int
    exit_code: int | None = None
    reason: str = ""
    started: float = 0.0
    seconds: float = 0.0
    host: str = ""
    world: int = 0
    mode: str = ""
    tokens: int = 0
    guard_share: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None
    applied: int = 0
    rejected: int = 0
    unresolved: str = ""
    left_out: int = 0
    incidents: tuple[Incident, ...] = ()
    by_person: tuple[IncidentAction, ...] = ()  # skips and rollbacks that somebody asked for
    commands: tuple[CommandRecord, ...] = ()
    checkpoints: tuple[CheckpointLine, ...] = ()
    restarts: tuple[Restart, ...] = ()
    troubles: tuple[str, ...] = ()


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
        left_out=_left_out(events),
        incidents=tuple(with_costs(run, events, IncidentBuilder().of(events))),
        by_person=tuple(asked_for(events)),
        commands=tuple(_answered(e) for e in events if e.kind == "command"),
        checkpoints=tuple(_checkpoints(events)),
        restarts=tuple(_restarts(run, events)),
        troubles=tuple(_troubles(events)),
        **{key: value for key, value in metrics.items() if key != "step"},
    )


def as_dict(run: RunDirectory) -> dict[str, Any]:
    """The report as JSON-able data; NaN and infinities are strings, as in the journal."""
    return msgspec.json.decode(encode_json(build(run)))


def text(run: RunDirectory) -> str:
    """The report for a person, plain text with the loss drawn in it."""
    from guardrail.report.render_text import tell
    from guardrail.report.text_chart import sketch

    report = build(run)
    return tell(report, drawn=sketch(run, report.incidents))


def written(run: RunDirectory, form: str) -> str:
    """The report as "terminal" (plain text), "markdown" or "html" (one file, with curves)."""
    if form == "terminal":
        return text(run) + "\n"
    from guardrail.report import render_html as pages
    from guardrail.report import svg_curves as curves
    from guardrail.report.outline import outline

    report = build(run)
    sections = list(outline(report))
    if form == "markdown":
        return pages.markdown(sections)
    return pages.page(sections, curves.draw(run, run.events(), report.incidents))


def save(path: str, content: str) -> None:
    """Write a report. Raises RunDirectoryError: it cannot be written there."""
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from error


# -- quarantine


def quarantine_lines(run: RunDirectory) -> list[str]:
    """All samples that the run leaves out, `ID` or `ID@EPOCH`, as `[data] quarantine = "FILE"`
    reads them.

    What the run's own quarantine file names, and the samples at the positions that the journal says
    were left out.

    Raises:
        RunDirectoryError: the order of the samples is not in the journal, or the file cannot be
            read; a list that is not complete would be worse than none.
    """
    from guardrail.decide.sample_order import SampleCursor

    events = run.events()
    spans = list(_spans(events))
    order = _order(events) if spans else None
    if spans and order is None:
        raise RunDirectoryError(
            f"{run.path}: the journal does not say in which order the samples came"
        )
    # An order of one sample serves where nothing but the file is left out.
    ledger = SampleCursor(order or _any_order(), batch_size=1)
    file = _quarantine_file(run)
    if file is not None:
        try:
            ledger.quarantine.read(read_file(file).decode("utf-8").splitlines(), source=str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(
                f"{file}: data.quarantine of this run cannot be read: {error}"
            ) from error
    for span in spans:
        ledger.leave_out(span)
    return list(ledger.quarantine.lines())


def _left_out(events: list[Event]) -> int:
    spans = list(_spans(events))
    order = _order(events) if spans else None
    if not spans or order is None:
        return -1 if spans else 0
    from guardrail.decide.sample_order import SampleCursor

    ledger = SampleCursor(order, batch_size=1)
    return sum(ledger.leave_out(span) for span in spans)


def _spans(events: Iterable[Event]) -> Iterator[Span]:
    """Each span that is still left out, once: a rollback may carry its own, beside or instead of a
    `left_out` line.
    """
    seen: list[Span] = []
    for event in events:
        if event.kind in ("left_out", "rollback"):
            span = span_of(event)
            if span is not None and span not in seen:
                seen.append(span)
        elif event.kind == "undo":
            back = undone_spans(event)
            seen = [span for span in seen if span not in back]
    yield from seen


def _order(events: Iterable[Event]) -> Any:
    from guardrail.decide.sample_order import SampleOrder

    for event in events:
        if event.kind == "started" and whole(event.data.get("samples")) > 0:
            seed = event.data.get("order_seed", event.data.get("seed", 0))
            shuffled = event.data.get("shuffled", True)
            return SampleOrder(
                samples=whole(event.data["samples"]), seed=whole(seed), shuffled=bool(shuffled)
            )
    return None


def _any_order() -> Any:
    from guardrail.decide.sample_order import SampleOrder

    return SampleOrder(samples=1)


def _quarantine_file(run: RunDirectory) -> Path | None:
    if not os.path.lexists(run.path / "config.toml"):
        return None
    try:
        data = tomllib.loads(run.config_text()).get("data", {})
    # also of very long numbers, and of brackets within each other
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{run.path / 'config.toml'}: not valid TOML ({error})") from error
    name = data.get("quarantine") if isinstance(data, dict) else None
    return Path(os.path.expanduser(name)) if isinstance(name, str) and name else None


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
