"""What a controller knows that outlives a rollback and a crash: facts, which the journal holds.
Pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import convert

from guardrail.core.events.event import SENSELESS, Event
from guardrail.core.format import format_plural
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records import (
    Action,
    Diagnosis,
    Finding,
    LossTrend,
    Observation,
    Severity,
    Verdict,
    field_of,
)
from guardrail.decide.control_commands.base import ReplayTarget
from guardrail.decide.control_commands.registry import replay_line
from guardrail.decide.diagnoses import Diagnoses, diagnosis_of
from guardrail.decide.incidents import CLOSED, OPEN, RECURRED, Incidents
from guardrail.decide.policy import Rollback, rollback_of
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

    def load_rollbacks(self, rollbacks: Iterable[Rollback | Mapping[str, Any]]) -> None:
        """All rollbacks of the run, oldest first, as records or as the data of `rollback`
        events.
        """
        self.rollbacks = [
            one if isinstance(one, Rollback) else rollback_of(one) for one in rollbacks
        ]

    def went_back(self, step: int, rollbacks: Iterable[Rollback | Mapping[str, Any]]) -> None:
        """The run has gone back to the state after `step` updates; `rollbacks` as `load_rollbacks`
        takes them.
        """
        self.load_rollbacks(rollbacks)
        self.incidents.rewind(step)

    def rebuild(self, events: Iterable[Event]) -> None:
        """Take the facts over from the journal's events, in order. Replaces what was known."""
        self.rollbacks, self.empty_spans, self.pardons = [], set(), list(self.settings.allowlist)
        self.levels, self.borne = [], []
        self.diagnoses = Diagnoses()
        began: list[int] = []  # timelines that the rollbacks began
        self.incidents = Incidents(confirm=self.settings.steps_until_good)
        known = _Known()
        for event in events:
            # A line that makes no sense changes nothing: `Past` counts it, and a run must be able
            # to go on after it.
            with contextlib.suppress(*SENSELESS):
                self._take_over(event, known, began)
        known.resume(self.incidents)

    def _take_over(self, event: Event, known: _Known, began: list[int]) -> None:
        """One line of the journal; `began` holds the timelines that the rollbacks before it
        began.
        """
        data = event.data
        if event.kind == "rollback":
            rollback, timeline = (
                rollback_of(data),
                int(data.get("new_timeline", event.timeline + 1)),
            )
            self.rollbacks.append(rollback)
            began.append(timeline)
            self.incidents.rewind(rollback.to_step)
        elif event.kind == "restarted":
            self.incidents.rewind(event.step, same_steps=True)
        elif event.kind == "undo":
            to_step, pardons = (
                int(data["to_step"]),
                [(int(first), int(last)) for first, last in data["pardons"]],
            )
            stand = [at for at, timeline in enumerate(began) if timeline not in data["rollbacks"]]
            self.rollbacks, began[:] = (
                [self.rollbacks[at] for at in stand],
                [began[at] for at in stand],
            )
            self.pardons += pardons
            self.incidents.rewind(to_step)
        elif event.kind == "diagnosis":
            at = int(data.get("at_step") or event.step + 1)
            diagnosis = diagnosis_of(data)
            known.last = max(known.last, at)
            first, last = map(int, data.get("batch") or (0, 0))
            self.note_cause(diagnosis, (first, last))
            self.diagnoses.learn(
                int(data["incident"]),
                diagnosis,
                onset=int(data.get("onset") or at),
                step=at,
                place=first,
                signals=data.get("signals") or (),
                rollbacks=self.rollbacks,
            )
        elif event.kind == "incident":
            known.turned(event, self.incidents)
        elif event.kind == "verdict":
            known.rejected(event)
            findings = data.get("findings") or ()
            if data.get("action") == Action.SKIP and findings and not _has_anomaly(findings):
                first, last = data["window"]
                self.empty_spans.add((int(first), int(last)))
        elif event.kind == "command":
            replay_line(event, _AcceptedIncidents(self, known))

    def incident_line(self, verdict: Verdict) -> tuple[str, dict[str, Any]]:
        """(Message, data) of the `incident` line of a verdict that turns an incident."""
        number, state, outcome = verdict.incident, verdict.incident_state, verdict.outcome
        lost = sum(one.from_step - one.to_step for one in self.rollbacks if one.incident == number)
        onset = verdict.onset or next(
            (one.onset for one in self.incidents.ended if one.number == number), None
        )
        data: dict[str, Any] = {
            "number": number,
            "state": state,
            "onset": onset,
            "steps_lost": lost,
        }
        data["at_step"] = verdict.step
        message = f"incident {number}: {state}"
        if state not in CLOSED:
            data["curve"] = self.incidents.curve
            return (
                f"{message}, {format_plural(lost, 'step')} repeated so far"
                if state == RECURRED
                else message
            ), data
        if outcome is not None:
            data |= {
                name: getattr(outcome, name) for name in ("expected", "got", "noise", "offset")
            }
            message += (
                f": loss {outcome.got:.4g} against {outcome.expected:.4g} that its curve before step "
                f"{onset} leads to, noise {outcome.noise:.2g}"
            )
        return message + (f"; {format_plural(lost, 'step')} repeated" if lost else ""), data


class _Known:
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

    def turned(self, event: Event, incidents: Incidents) -> None:
        """An `incident` line. What has ended is added to `incidents`."""
        data, number = event.data, int(event.data["number"])
        self.number = max(self.number, number)
        self._earlier(number, data.get("onset"))
        if data.get("state") in (OPEN, RECURRED):
            self.open = number
            raw = data.get("curve")
            self._curves[number] = (
                raw if raw is None or isinstance(raw, LossTrend) else convert(raw, LossTrend)
            )
            return
        self.open = 0
        at, onset = (
            int(data.get("at_step") or event.step + 1),
            self._onsets.get(number, event.step + 1),
        )
        incidents.end(
            number, str(data.get("state")), step=at, onset=onset, curve=self._curves.get(number)
        )

    def rejected(self, event: Event) -> None:
        """A `verdict` line."""
        data, number = event.data, event.data.get("incident")
        if number is not None and (data.get("action") != Action.APPLY or data.get("would")):
            self.last = max(self.last, int(data.get("at_step") or event.step))
            self._earlier(int(number), data.get("onset"))

    def _earlier(self, number: int, onset: Any) -> None:
        if onset is not None:
            self._onsets[number] = min(int(onset), self._onsets.get(number, int(onset)))

    def resume(self, incidents: Incidents) -> None:
        onset, curve = self._onsets.get(self.open, 0), self._curves.get(self.open)
        incidents.resume(
            self.number, is_open=bool(self.open), onset=onset, step=self.last, curve=curve
        )


class _AcceptedIncidents(ReplayTarget):
    """What command lines of the journal change in a memory."""

    def __init__(self, memory: ControllerMemory, known: _Known) -> None:
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


def _has_anomaly(findings: Iterable[Any]) -> bool:
    """Return whether a finding of a journal line counts towards a rollback."""
    return any(find_detector(field_of(finding, "kind")).is_anomaly for finding in findings)
