"""What a controller knows that outlives a rollback and a crash: facts, which the journal holds.
Pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from msgspec.structs import replace

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
from guardrail.core.records import (
    Action,
    Diagnosis,
    Finding,
    LossTrend,
    Observation,
    Severity,
    Verdict,
)
from guardrail.decide.control_commands.base import ReplayTarget
from guardrail.decide.control_commands.registry import replay_line
from guardrail.decide.diagnoses import Diagnoses, diagnosis_of
from guardrail.decide.incidents import Incidents
from guardrail.decide.rollback import Rollback, rollback_of
from guardrail.detectors.build import find_detector


class ControllerMemory:
    """Attributes:
    incidents: numbered; the last one may be open. rollbacks: all that were done and stand, oldest
    first. diagnoses: what replays have told about causes. pardons: stretches [first, last) of
    positions whose batches are applied whatever is found, as far as it is finite. levels: stretches
    of batches with which the data became another kind; they are applied, as far as they are finite.
    borne: stretches of batches that were raised a little, and no batch is to blame; likewise.
    empty_spans: stretches that were rejected for want of labels: no sign of trouble.
    """

    def __init__(self, settings: GuardOptions) -> None:
        self.settings = settings
        self.incidents = Incidents(confirm=settings.steps_until_good)
        self.rollbacks: list[Rollback] = []
        self.diagnoses = Diagnoses()
        self.pardons: list[tuple[int, int]] = list(settings.allowlist)
        self.levels: list[tuple[int, int]] = []
        self.borne: list[tuple[int, int]] = []
        self.empty_spans: set[tuple[int, int]] = set()

    def pardoned(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Whether a person has said that this batch is to be applied. No pardon lets a NaN into the
        weights.
        """
        within = any(first < obs.last and obs.first < last for first, last in self.pardons)
        return within and _pardonable(findings)

    def begins_level(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Whether a replay has shown that from this batch on the data is another kind."""
        return _begins_in(self.levels, obs) and _pardonable(findings)

    def is_borne(self, obs: Observation) -> bool:
        """Whether a replay has shown that the raised numbers of this batch are those of every
        batch.
        """
        return _begins_in(self.borne, obs)

    def note_cause(self, diagnosis: Diagnosis, batch: tuple[int, int]) -> None:
        """What its cause says of the batch itself."""
        if diagnosis.shift:
            self.levels.append(batch)
        if diagnosis.borne:
            self.borne.append(batch)

    def pardon(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Do not reject batches with a position in these stretches [first, last) again: a person
        took that back.
        """
        self.pardons += [(first, last) for first, last in stretches]

    def accept(self, step: int, batch: tuple[int, int]) -> tuple[int, ...]:
        """A user accepts the run as it is after `step` updates. Returns the incidents that were not
        over.

        Args:
            batch: positions [first, last) of the next one. While an incident is open, it is the
            first of a new level.
        """
        if self.incidents.open:
            self.levels.append(batch)
        return self.incidents.accept(step)

    def load_rollbacks(self, rollbacks: Iterable[Rollback]) -> None:
        """Replace the rollbacks of the run; oldest first."""
        self.rollbacks = list(rollbacks)

    def went_back(self, step: int, rollbacks: Iterable[Rollback]) -> None:
        """Take note that the state after `step` updates was restored; `rollbacks`: all of the run."""
        self.load_rollbacks(rollbacks)
        self.incidents.rewind(step)

    def rebuild(self, events: Iterable[Event]) -> None:
        """Take the facts over from the journal's events, in order. Replaces what was known."""
        self.rollbacks, self.empty_spans, self.pardons = [], set(), list(self.settings.allowlist)
        self.levels, self.borne = [], []
        self.diagnoses = Diagnoses()
        self.incidents = Incidents(confirm=self.settings.steps_until_good)
        known = _KnownIncidents()
        for event in events:
            # A damaged line changes nothing: `RunHistory` counts it, and the run must continue.
            with contextlib.suppress(*SENSELESS):
                self._take_over(event, known)
        known.resume(self.incidents)

    def _take_over(self, event: Event, known: _KnownIncidents) -> None:
        """Learn from one line of the journal. Raises one of SENSELESS where it is damaged."""
        match event:
            case RolledBack():
                rollback = rollback_of(event)
                self.rollbacks.append(rollback)
                self.incidents.rewind(rollback.to_step)
            case Restarted():
                self.incidents.rewind(event.step, same_steps=True)
            case Undone():
                self._undo(event)
            case Diagnosed():
                self._add_diagnosis(event, known)
            case IncidentChanged():
                known.add_change(event, self.incidents)
            case VerdictGiven():
                known.add_verdict(event)
                if event.action == Action.SKIP and event.findings and event.window is not None:
                    if not _has_anomaly(event.findings):
                        self.empty_spans.add(event.window)
            case CommandAnswered():
                replay_line(event, _AcceptedIncidents(self, known))

    def _undo(self, event: Undone) -> None:
        event.check_readable("rollbacks", "pardons")
        if event.to_step is None:
            raise ValueError(f"line {event.seq}: an undo to no state")
        self.rollbacks = [one for one in self.rollbacks if one.new_timeline not in event.rollbacks]
        self.pardons += event.pardons
        self.incidents.rewind(event.to_step)

    def _add_diagnosis(self, event: Diagnosed, known: _KnownIncidents) -> None:
        diagnosis = diagnosis_of(event)
        if event.incident is None:
            raise ValueError(f"line {event.seq}: a diagnosis of no incident")
        at = event.at_step or event.step + 1
        batch = event.batch or (0, 0)
        known.last = max(known.last, at)
        self.note_cause(diagnosis, batch)
        self.diagnoses.learn(
            event.incident,
            diagnosis,
            onset=event.onset or at,
            step=at,
            place=batch[0],
            signals=event.signals,
            rollbacks=self.rollbacks,
        )

    def incident_line(self, verdict: Verdict) -> IncidentChanged:
        """Return the journal line of a verdict that opens, repeats or ends an incident."""
        assert verdict.incident is not None
        number, outcome = verdict.incident, verdict.outcome
        ended = [one.onset for one in self.incidents.ended if one.number == number]
        line = IncidentChanged(
            number=number,
            state=verdict.incident_state,
            onset=verdict.onset or next(iter(ended), None),
            steps_lost=sum(
                one.from_step - one.to_step for one in self.rollbacks if one.incident == number
            ),
            at_step=verdict.step,
        )
        if not line.is_closed:
            return replace(line, curve=self.incidents.curve)
        if outcome is None:
            return line
        return replace(
            line,
            expected=outcome.expected,
            got=outcome.got,
            noise=outcome.noise,
            offset=outcome.offset,
        )


class _KnownIncidents:
    """What a journal says of incidents, up to one of its lines.

    Attributes:
        open: number of the one that is open, 0: none is.
        number: of the last one.
        last: step of the last finding.
    """

    def __init__(self) -> None:
        self.open = self.number = self.last = 0
        self._onsets: dict[int, int] = {}
        self._curves: dict[int, LossTrend | None] = {}

    def add_change(self, event: IncidentChanged, incidents: Incidents) -> None:
        """Learn from an `incident` line. One that has ended is added to `incidents`."""
        event.check_readable("number", "onset", "curve")
        number = event.number
        self.number = max(self.number, number)
        self._add_onset(number, event.onset)
        if event.state in (OPEN, REPEATED):
            self.open = number
            self._curves[number] = event.curve
            return
        self.open = 0
        incidents.end(
            number,
            event.state,
            step=event.at_step or event.step + 1,
            onset=self._onsets.get(number, event.step + 1),
            curve=self._curves.get(number),
        )

    def add_verdict(self, event: VerdictGiven) -> None:
        if event.incident is None or (event.action == Action.APPLY and not event.would):
            return
        self.last = max(self.last, event.at_step or event.step)
        self._add_onset(event.incident, event.onset)

    def _add_onset(self, number: int, onset: int | None) -> None:
        if onset is not None:
            self._onsets[number] = min(onset, self._onsets.get(number, onset))

    def resume(self, incidents: Incidents) -> None:
        onset, curve = self._onsets.get(self.open, 0), self._curves.get(self.open)
        incidents.resume(
            self.number, is_open=bool(self.open), onset=onset, step=self.last, curve=curve
        )


class _AcceptedIncidents(ReplayTarget):
    """What command lines of the journal change in a memory."""

    def __init__(self, memory: ControllerMemory, known: _KnownIncidents) -> None:
        self._memory, self._known = memory, known

    def accept_incidents(self, step: int, batch: tuple[int, int]) -> None:
        self._known.resume(self._memory.incidents)
        self._memory.accept(step, batch)
        self._known.open = 0


def _begins_in(stretches: Iterable[tuple[int, int]], obs: Observation) -> bool:
    return any(first <= obs.first < last for first, last in stretches)


def _pardonable(findings: Iterable[Finding]) -> bool:
    return all(
        finding.severity is Severity.NOTE or find_detector(finding.kind).may_be_allowlisted
        for finding in findings
    )


def _has_anomaly(findings: Iterable[Finding]) -> bool:
    """Return whether a finding of a journal line counts towards a rollback."""
    return any(find_detector(finding.kind).is_anomaly for finding in findings)
