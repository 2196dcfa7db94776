"""What happened in a run: from a run directory to a typed report, to JSON, to text, and to a quarantine file.

Works on a run that is young, running, ended or dead: whatever the journal does not say is left out of the report.
Text that came from outside is cleaned here, so that every way of showing the report is safe.
"""

from __future__ import annotations

import os
import socket
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from guardrail.errors import RunDirectoryError
from guardrail.files import as_float, encode_json
from guardrail.records import Event, Finding, Record, Span, Status
from guardrail.rundir import RunDirectory, findings_of, span_of
from guardrail.text import clean

_FRESH_SECONDS = 30.0  # a status younger than this means that somebody lives, on whatever host
_NEAR = 20  # verdicts without an incident's number belong together up to this many steps apart


class Document(Record, frozen=True, kw_only=True):
    """A stretch of a document that was left out. `record` counts from 1; 0: the file is the document."""

    path: str
    record: int = 0
    first_byte: int = 0
    last_byte: int = 0
    excerpt: str = ""


class Deed(Record, frozen=True, kw_only=True):
    """What was done about an incident.

    Attributes:
        action: "skip", "rollback", "pause", "halt", or "would ..." where the guard only advised.
        step, timeline: where the run stood.
        to_step, tier, steps_lost: of a rollback: the snapshot used, and applied updates that were given up.
        window: positions [first, last) of the sample order that were left out.
    """

    action: str
    step: int
    timeline: int
    time: float
    sentence: str
    to_step: int | None = None
    tier: str = ""
    steps_lost: int = 0
    window: tuple[int, int] | None = None


class Incident(Record, frozen=True, kw_only=True):
    """Findings that belong together, with what was done and what was left out. `number` 0: the journal gave none."""

    number: int
    state: str  # "open" or "recovered"
    onset: int
    opened: float
    closed: float | None = None
    findings: tuple[Finding, ...] = ()
    parameters: dict[str, list[str]] = msgspec.field(default_factory=dict)  # rank -> non-finite gradients
    deeds: tuple[Deed, ...] = ()
    spans: tuple[Span, ...] = ()
    samples: int = 0
    documents: tuple[Document, ...] = ()
    documents_total: int = 0


class Answered(Record, frozen=True, kw_only=True):
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
    """The run went on from `checkpoint`; `steps_lost` updates had been applied behind it and were made again."""

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
        state: phase of the last word; "running", or "lost" when there is none and nobody lives; "new".
        reason: the last word itself.
        seconds: from the first event to the last sign of life.
        applied, rejected: rows of the present timeline.
        left_out: samples in quarantine by this run, those of a file not counted; -1: the journal lacks the order.
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
    left_out: int = 0
    incidents: tuple[Incident, ...] = ()
    by_person: tuple[Deed, ...] = ()  # skips and rollbacks that somebody asked for
    commands: tuple[Answered, ...] = ()
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
        host=clean(str(first.data.get("host") or (status.host if status else "")), 80) if first else "",
        world=_whole(first.data.get("world")) if first else (status.world if status else 0),
        mode=status.mode.value if status else "",
        tokens=status.tokens if status else 0,
        guard_share=status.guard_share if status else 0.0,
        left_out=_left_out(events),
        incidents=tuple(_Incidents().of(events)),
        by_person=tuple(_by_person(events)),
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
    """The report for a person, plain text."""
    from guardrail.telling import tell

    return tell(build(run))


# -- quarantine


def quarantine_lines(run: RunDirectory) -> list[str]:
    """All samples that the run leaves out, `ID` or `ID@EPOCH`, as `[data] quarantine = "FILE"` reads them.

    What the run's own quarantine file names, and the samples at the positions that the journal says were left out.

    Raises:
        RunDirectoryError: the order of the samples is not in the journal, or the file cannot be read; a list that
            is not complete would be worse than none.
    """
    from guardrail.ledger import Ledger

    events = run.events()
    spans = list(_spans(events))
    order = _order(events) if spans else None
    if spans and order is None:
        raise RunDirectoryError(f"{run.path}: the journal does not say in which order the samples came")
    # An order of one sample serves where nothing but the file is left out.
    ledger = Ledger(order or _any_order(), batch_size=1)
    file = _quarantine_file(run)
    if file is not None:
        try:
            ledger.quarantine.read(file.read_text(encoding="utf-8").splitlines(), source=str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{file}: data.quarantine of this run cannot be read: {error}") from error
    for span in spans:
        ledger.leave_out(span)
    return list(ledger.quarantine.lines())


def _left_out(events: list[Event]) -> int:
    spans = list(_spans(events))
    order = _order(events) if spans else None
    if not spans or order is None:
        return -1 if spans else 0
    from guardrail.ledger import Ledger

    ledger = Ledger(order, batch_size=1)
    return sum(ledger.leave_out(span) for span in spans)


def _spans(events: Iterable[Event]) -> Iterator[Span]:
    """Each span once: a rollback may carry its own, beside or instead of a `left_out` line."""
    seen: list[Span] = []
    for event in events:
        if event.kind in ("left_out", "rollback"):
            span = span_of(event)
            if span is not None and span not in seen:
                seen.append(span)
                yield span


def _order(events: Iterable[Event]) -> Any:
    from guardrail.ledger import SampleOrder

    for event in events:
        if event.kind == "started" and _whole(event.data.get("samples")) > 0:
            seed = event.data.get("order_seed", event.data.get("seed", 0))
            shuffled = event.data.get("shuffled", True)
            return SampleOrder(samples=_whole(event.data["samples"]), seed=_whole(seed), shuffled=bool(shuffled))
    return None


def _any_order() -> Any:
    from guardrail.ledger import SampleOrder

    return SampleOrder(samples=1)


def _quarantine_file(run: RunDirectory) -> Path | None:
    try:
        data = tomllib.loads(run.config_text()).get("data", {})
    except (RunDirectoryError, tomllib.TOMLDecodeError):
        return None
    name = data.get("quarantine") if isinstance(data, dict) else None
    return Path(os.path.expanduser(name)) if isinstance(name, str) and name else None


# -- how it stands


def _state(run: RunDirectory, status: Status | None, events: list[Event]) -> tuple[str, Event | None]:
    """The state, and the event that is the last word, if there is one."""
    turns = [e for e in events if e.kind in ("started", "restarted", "ended")]
    if turns and turns[-1].kind == "ended":
        phase = turns[-1].data.get("phase")
        return clean(str(phase or (status.phase.value if status else "ended")), 40), turns[-1]
    if status is None:
        return ("lost" if turns and run.lock_holder() is None else "running" if turns else "new"), None
    if status.phase.ended:
        return status.phase.value, None
    return ("running" if _alive(run, status) else "lost"), None


def _alive(run: RunDirectory, status: Status) -> bool:
    """A trainer holds the lock, somebody wrote the status just now, or a supervisor on this host is at work."""
    if run.lock_holder() is not None or time.time() - status.heartbeat < _FRESH_SECONDS:
        return True
    from guardrail.processes import supervisor_of

    return status.host == socket.gethostname() and supervisor_of(run.path, status.supervisor_pid) is not None


def _exit_code(status: Status | None, last: Event | None) -> int | None:
    code = last.data.get("exit_code") if last else None
    if isinstance(code, int):
        return code
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


# -- incidents


class _Incidents:
    """Gathers events into incidents: by number, else with what happened close by."""

    def __init__(self) -> None:
        self._found: dict[int, Incident] = {}
        self._unnumbered = 0

    def of(self, events: Iterable[Event]) -> list[Incident]:
        for event in events:
            match event.kind:
                case "verdict" | "finding":
                    self._verdict(event)
                case "left_out" | "rollback":
                    self._remedy(event)
                case "incident":
                    self._turn(event)
        # Found under negative numbers where the journal gave none.
        return [
            msgspec.structs.replace(incident, number=max(0, number)) if number < 0 else incident
            for number, incident in self._found.items()
        ]

    def _verdict(self, event: Event) -> None:
        action = event.data.get("action", "")
        would = event.data.get("would")
        findings = findings_of(event)
        if not findings and action in ("", "apply"):
            return
        incident = self._at(event, findings)
        changes: dict[str, Any] = {"findings": _joined(incident.findings, findings)}
        parameters = event.data.get("parameters")
        if isinstance(parameters, dict):
            changes["parameters"] = incident.parameters | {
                clean(str(rank), 20): [clean(str(name), 200) for name in names]
                for rank, names in parameters.items()
                if isinstance(names, list)
            }
        # A rollback is told by its own line, with the snapshot that was used.
        if action == "apply" and would and would != "apply":
            action = f"would {would}"
        if action not in ("", "apply", "rollback"):
            changes["deeds"] = (*incident.deeds, _deed(event, clean(str(action), 40)))
        self._put(incident, changes)

    def _remedy(self, event: Event) -> None:
        span = span_of(event)
        if span is not None and span.cause == "user":
            return
        incident = self._at(event)
        changes: dict[str, Any] = {}
        if span is not None and span not in incident.spans:
            changes = _with_span(incident, span, event)
        if event.kind == "rollback":
            changes["deeds"] = (*incident.deeds, _deed(event, "rollback"))
        self._put(incident, changes)

    def _turn(self, event: Event) -> None:
        over = event.data.get("state") == "recovered"
        self._put(self._at(event), {"state": "recovered", "closed": event.time} if over else {})

    def _at(self, event: Event, findings: Iterable[Finding] = ()) -> Incident:
        """The incident of an event. Its onset is the earliest that anything names."""
        number = _whole(event.data.get("incident", event.data.get("number")))
        if number <= 0:
            number = self._close_by(event)
        named = [event.data.get("onset"), *(finding.onset for finding in findings)]
        onsets = [onset for onset in named if isinstance(onset, int) and onset > 0]
        incident = self._found.get(number) or self._adopted(number, event)
        if incident is None:
            onset = min(onsets, default=event.step)
            return Incident(number=number, state="open", onset=onset, opened=event.time)
        return msgspec.structs.replace(incident, onset=min([incident.onset, *onsets]))

    def _adopted(self, number: int, event: Event) -> Incident | None:
        """A verdict may have come before the line that gives its incident a number."""
        before = self._near(event)
        if number < 0 or before is None or before.number > 0:
            return None
        del self._found[before.number]
        return msgspec.structs.replace(before, number=number)

    def _close_by(self, event: Event) -> int:
        before = self._near(event)
        if before is not None:
            return before.number
        self._unnumbered -= 1
        return self._unnumbered

    def _near(self, event: Event) -> Incident | None:
        """The newest incident, if it is open and the event happened close by."""
        last = next(reversed(self._found.values()), None)
        if last is None or last.state != "open":
            return None
        steps = [deed.step for deed in last.deeds] + [finding.step for finding in last.findings] + [last.onset]
        return last if min(abs(event.step - step) for step in steps) <= _NEAR else None

    def _put(self, incident: Incident, changes: dict[str, Any]) -> None:
        self._found[incident.number] = msgspec.structs.replace(incident, **changes)


def _joined(known: tuple[Finding, ...], new: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst of each kind of finding on each signal, in the order in which they first appeared."""
    worst = {(f.signal, f.kind): f for f in known}
    for finding in new:
        key = (finding.signal, finding.kind)
        before = worst.get(key)
        if before is None or (before.score == before.score and not finding.score <= before.score):
            worst[key] = finding
    return tuple(msgspec.structs.replace(f, signal=clean(f.signal, 60)) for f in worst.values())


def _deed(event: Event, action: str) -> Deed:
    data = event.data
    window = data.get("window")
    to_step = data.get("to_step")
    lost = _whole(data.get("from_step")) - to_step if isinstance(to_step, int) else 0
    span = span_of(event)
    return Deed(
        action=action,
        step=event.step,
        timeline=event.timeline,
        time=event.time,
        sentence=clean(event.message, 600),
        to_step=to_step if isinstance(to_step, int) else None,
        tier=clean(str(data.get("tier", "")), 40),
        steps_lost=max(0, lost),
        window=_pair(window) or ((span.first, span.last) if span else None),
    )


def _with_span(incident: Incident, span: Span, event: Event) -> dict[str, Any]:
    """A rollback's window usually covers the batches that were rejected before it: nothing counts twice."""
    documents = _documents(event)
    total = max(_whole(event.data.get("documents_total")), len(documents))
    spans = (*incident.spans, span)
    if not all(span.first <= known.first and known.last <= span.last for known in incident.spans):
        documents = tuple(dict.fromkeys((*incident.documents, *documents)))
        total += incident.documents_total
    samples, end = 0, 0
    for first, last in sorted((known.first, known.last) for known in spans):
        samples += max(0, last - max(first, end))
        end = max(end, last)
    return {"spans": spans, "samples": samples, "documents": documents, "documents_total": total}


def _documents(event: Event) -> tuple[Document, ...]:
    found = []
    raw = event.data.get("documents")
    for item in raw if isinstance(raw, list) else []:
        if isinstance(item, str):
            found.append(Document(path=clean(item, 400)))
        elif isinstance(item, dict):
            found.append(
                Document(
                    path=clean(str(item.get("path", "")), 400),
                    record=_whole(item.get("record")),
                    first_byte=_whole(item.get("first_byte")),
                    last_byte=_whole(item.get("last_byte")),
                    excerpt=clean(str(item.get("excerpt") or ""), 200),
                )
            )
    return tuple(found)


# -- the rest


def _by_person(events: Iterable[Event]) -> Iterator[Deed]:
    for event in events:
        span = span_of(event) if event.kind in ("left_out", "rollback") else None
        if span is not None and span.cause == "user":
            yield _deed(event, "rollback" if event.kind == "rollback" else "skip")


def _answered(event: Event) -> Answered:
    data = event.data
    return Answered(
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
            step=_whole(data.get("cp_step")) or (known.step if known else event.step),
            state=clean(str(data.get("state", "")), 40),
            bytes=_whole(data.get("bytes")) or (known.bytes if known else 0),
            reason=clean(str(data.get("reason") or ""), 400),
            time=event.time,
        )
    return list(found.values())


def _restarts(run: RunDirectory, events: list[Event]) -> Iterator[Restart]:
    """What was lost is counted in applied rows: those that the restart itself abandoned."""
    restarts = [e for e in events if e.kind == "restarted"]
    if not restarts:
        return
    view = run.metrics(["step", "timeline", "verdict"])
    steps, timelines, verdicts = view.array.T
    for event in restarts:
        before = timelines < event.timeline
        last = timelines[before].max() if before.any() else -1
        reached = steps[(timelines == last) & (verdicts == 0)]
        lost = int(reached.max()) - event.step if len(reached) else 0
        check = next((e for e in events if e.seq > event.seq and e.kind in ("resume_check", "restarted")), None)
        parts = check.data if check is not None and check.kind == "resume_check" else {}
        yield Restart(
            step=event.step,
            timeline=event.timeline,
            time=event.time,
            checkpoint=clean(str(event.data.get("checkpoint") or ""), 120),
            steps_lost=max(0, lost),
            sentence=clean(event.message or str(event.data.get("reason") or ""), 400),
            differs=tuple(clean(f"{part}: {outcome}", 200) for part, outcome in parts.items() if outcome != "ok"),
        )


def _troubles(events: Iterable[Event]) -> Iterator[str]:
    for event in events:
        if event.kind in ("hung", "ranks_failed", "durability", "note") and event.message:
            yield clean(event.message, 400)


def _whole(value: Any) -> int:
    if isinstance(value, float) and value == value and abs(value) < 2**63:
        return int(value)
    return value if isinstance(value, int) else 0


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None
