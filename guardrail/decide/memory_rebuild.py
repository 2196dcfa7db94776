"""The memory of a controller, read back from the journal after a restart. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from guardrail.core.events.decisions import (
    OPEN,
    REPEATED,
    Diagnosed,
    IncidentChanged,
    RolledBack,
    Undone,
    VerdictGiven,
)
from guardrail.core.events.event import SENSELESS, Event
from guardrail.core.events.run_state import CommandAnswered, Restarted
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.findings import Finding
from guardrail.core.records.verdicts import Action, LossTrend
from guardrail.decide.control_commands.base import ReplayTarget
from guardrail.decide.control_commands.registry import replay_line
from guardrail.decide.diagnoses import read_diagnosis
from guardrail.decide.memory import ControllerMemory
from guardrail.decide.rollback import rollback_of
from guardrail.detectors.build import find_detector


def rebuild_memory(settings: GuardOptions, events: Iterable[Event]) -> ControllerMemory:
    """Return the memory that the events of a journal lead to.

    A damaged line changes nothing. `RunHistory` counts such lines, and the run must continue.
    """
    rebuild = _Rebuild(ControllerMemory(settings))
    for event in events:
        with contextlib.suppress(*SENSELESS):
            rebuild.apply(event)
    rebuild.resume_incidents()
    return rebuild.memory


class _Rebuild(ReplayTarget):
    """Applies one journal line after the other.

    Attributes:
        memory: up to the last line.
    """

    def __init__(self, memory: ControllerMemory) -> None:
        self.memory = memory
        self._open = 0  # number of the open incident, 0: none
        self._number = 0  # of the last incident
        self._last = 0  # step of the last finding
        self._onsets: dict[int, int] = {}  # incident -> first step
        self._trends: dict[int, LossTrend | None] = {}  # incident -> loss before it

    def apply(self, event: Event) -> None:
        """Apply one line. Raises one of SENSELESS where it is damaged."""
        match event:
            case RolledBack():
                rollback = rollback_of(event)
                self.memory.rollbacks.append(rollback)
                self.memory.incidents.rewind(rollback.to_step)
            case Restarted():
                self.memory.incidents.rewind(event.step, same_steps=True)
            case Undone():
                self._undo(event)
            case Diagnosed():
                self._add_diagnosis(event)
            case IncidentChanged():
                self._change_incident(event)
            case VerdictGiven():
                self._add_verdict(event)
            case CommandAnswered():
                replay_line(event, self)

    # -- one kind of line --------------------------------------------------------------------------

    def _undo(self, event: Undone) -> None:
        event.check_readable("rollbacks", "pardons")
        if event.to_step is None:
            raise ValueError(f"line {event.seq}: an undo to no state")
        memory = self.memory
        memory.rollbacks = [
            one for one in memory.rollbacks if one.new_timeline not in event.rollbacks
        ]
        memory.allow(event.pardons)
        memory.incidents.rewind(event.to_step)

    def _add_diagnosis(self, event: Diagnosed) -> None:
        diagnosis = read_diagnosis(event)
        if event.incident is None:
            raise ValueError(f"line {event.seq}: a diagnosis of no incident")
        at = event.at_step or event.step + 1
        batch = event.batch or (0, 0)
        self._last = max(self._last, at)
        self.memory.note_cause(diagnosis, batch)
        self.memory.diagnoses.add(
            event.incident,
            diagnosis,
            onset=event.onset or at,
            step=at,
            place=batch[0],
            signals=event.signals,
            rollbacks=self.memory.rollbacks,
        )

    def _change_incident(self, event: IncidentChanged) -> None:
        event.check_readable("number", "onset", "curve")
        number = event.number
        self._number = max(self._number, number)
        self._note_onset(number, event.onset)
        if event.state in (OPEN, REPEATED):
            self._open = number
            self._trends[number] = event.curve
            return
        self._open = 0
        self.memory.incidents.end(
            number,
            event.state,
            step=event.at_step or event.step + 1,
            onset=self._onsets.get(number, event.step + 1),
            curve=self._trends.get(number),
        )

    def _add_verdict(self, event: VerdictGiven) -> None:
        if event.incident is not None and (event.action != Action.APPLY or event.would):
            self._last = max(self._last, event.at_step or event.step)
            self._note_onset(event.incident, event.onset)
        if event.action == Action.SKIP and event.findings and event.window is not None:
            if not _has_anomaly(event.findings):
                self.memory.empty_spans.add(event.window)

    def accept_incidents(self, step: int, batch: tuple[int, int]) -> None:
        """Follow a command that accepted the run as it was."""
        self.resume_incidents()
        self.memory.accept(step, batch)
        self._open = 0

    # -- incidents ---------------------------------------------------------------------------------

    def resume_incidents(self) -> None:
        """Set which incident is open."""
        self.memory.incidents.resume(
            self._number,
            is_open=bool(self._open),
            onset=self._onsets.get(self._open, 0),
            step=self._last,
            curve=self._trends.get(self._open),
        )

    def _note_onset(self, number: int, onset: int | None) -> None:
        if onset is not None:
            self._onsets[number] = min(onset, self._onsets.get(number, onset))


def _has_anomaly(findings: Iterable[Finding]) -> bool:
    """Return whether a finding of a journal line counts towards a rollback."""
    return any(find_detector(finding.kind).is_anomaly for finding in findings)
