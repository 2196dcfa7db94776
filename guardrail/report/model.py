"""The report of a run as typed records: what `build` makes of a run directory, and JSON."""

from __future__ import annotations

from guardrail.core.records import Record
from guardrail.report.incident import Incident, IncidentAction


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
