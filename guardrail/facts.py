"""What a controller knows that outlives a rollback and a crash: facts, which the journal holds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import convert

from guardrail.config import GuardSection
from guardrail.diagnoses import Diagnoses, diagnosis_of
from guardrail.incidents import CLOSED, OPEN, RECURRED, Incidents
from guardrail.policy import UNSUSPECTED, Rollback, rollback_of
from guardrail.records import Action, Curve, Diagnosis, Event, Finding, Kind, Observation, Severity, Verdict, field_of

# An update with these has no meaning, whoever wishes for it.
UNPARDONABLE = frozenset({Kind.NONFINITE, Kind.NO_TOKENS, Kind.SCALE_COLLAPSE})


class Facts:
    """Attributes:
    incidents: numbered; the last one may be open.
    rollbacks: all that were done and stand, oldest first.
    diagnoses: what replays have told about causes.
    pardons: stretches [first, last) of positions whose batches are applied whatever is found, as far as it is finite.
    levels: stretches of batches with which the data became another kind; they are applied, as far as they are finite.
    borne: stretches of batches that were raised a little, and no batch is to blame; likewise.
    empty_spans: stretches that were rejected for want of labels: no sign of trouble.
    """

    def __init__(self, settings: GuardSection) -> None:
        self.settings = settings
        self.incidents = Incidents(confirm=settings.confirm)
        self.rollbacks: list[Rollback] = []
        self.diagnoses = Diagnoses()
        self.pardons: list[tuple[int, int]] = list(settings.pardon)
        self.levels: list[tuple[int, int]] = []
        self.borne: list[tuple[int, int]] = []
        self.empty_spans: set[tuple[int, int]] = set()

    def pardoned(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Whether a person has said that this batch is to be applied. No pardon lets a NaN into the weights."""
        within = any(first < obs.last and obs.first < last for first, last in self.pardons)
        return within and _pardonable(findings)

    def begins_level(self, obs: Observation, findings: Iterable[Finding]) -> bool:
        """Whether a replay has shown that from this batch on the data is another kind."""
        return _begins_in(self.levels, obs) and _pardonable(findings)

    def is_borne(self, obs: Observation) -> bool:
        """Whether a replay has shown that the raised numbers of this batch are those of every batch."""
        return _begins_in(self.borne, obs)

    def note_cause(self, diagnosis: Diagnosis, batch: tuple[int, int]) -> None:
        """What its cause says of the batch itself."""
        if diagnosis.shift:
            self.levels.append(batch)
        if diagnosis.borne:
            self.borne.append(batch)

    def pardon(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Do not reject batches with a position in these stretches [first, last) again: a person took that back."""
        self.pardons += [(first, last) for first, last in stretches]

    def load_rollbacks(self, rollbacks: Iterable[Rollback | Mapping[str, Any]]) -> None:
        """All rollbacks of the run, oldest first, as records or as the data of `rollback` events."""
        self.rollbacks = [one if isinstance(one, Rollback) else rollback_of(one) for one in rollbacks]

    def rebuild(self, events: Iterable[Event]) -> None:
        """Take the facts over from the journal's events, in order. Replaces what was known."""
        self.rollbacks, self.empty_spans, self.pardons = [], set(), list(self.settings.pardon)
        self.levels, self.borne = [], []
        self.diagnoses = Diagnoses()
        began: list[int] = []  # timelines that the rollbacks began
        self.incidents = Incidents(confirm=self.settings.confirm)
        open_number = onset = step = number = 0
        curve: Curve | None = None
        for event in events:
            data = event.data
            if event.kind == "rollback":
                self.rollbacks.append(rollback_of(data))
                began.append(int(data.get("new_timeline", event.timeline + 1)))
            elif event.kind == "undo":
                stand = [at for at, timeline in enumerate(began) if timeline not in data["rollbacks"]]
                self.rollbacks, began = [self.rollbacks[at] for at in stand], [began[at] for at in stand]
                self.pardons += [(int(first), int(last)) for first, last in data["pardons"]]
            elif event.kind == "cause":
                at = int(data.get("at_step") or event.step + 1)
                step, diagnosis = max(step, at), diagnosis_of(data)
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
                number = max(number, int(data["number"]))
                is_open = data.get("state") in (OPEN, RECURRED)
                raw = data.get("curve")
                curve = raw if raw is None or isinstance(raw, Curve) else convert(raw, Curve)
                open_number, onset = (int(data["number"]), int(data.get("onset") or 0)) if is_open else (0, 0)
            elif event.kind == "verdict":
                if data.get("incident") is not None and (data.get("action") != Action.APPLY or data.get("would")):
                    step = max(step, int(data.get("at_step") or event.step))
                kinds = {field_of(finding, "kind") for finding in data.get("findings") or ()}
                if data.get("action") == Action.SKIP and kinds and kinds <= UNSUSPECTED:
                    first, last = data["window"]
                    self.empty_spans.add((int(first), int(last)))
        self.incidents.resume(number, is_open=bool(open_number), onset=onset, step=step, curve=curve)

    def incident_line(self, verdict: Verdict) -> tuple[str, dict[str, Any]]:
        """(Message, data) of the `incident` line of a verdict that turns an incident."""
        number, state, outcome = verdict.incident, verdict.incident_state, verdict.outcome
        lost = sum(one.from_step - one.to_step for one in self.rollbacks if one.incident == number)
        data: dict[str, Any] = {"number": number, "state": state, "onset": verdict.onset, "steps_lost": lost}
        message = f"incident {number}: {state}"
        if state not in CLOSED:
            data["curve"] = self.incidents.curve
            return (f"{message}, {lost} steps are made again so far" if state == RECURRED else message), data
        if outcome is not None:
            data |= {name: getattr(outcome, name) for name in ("expected", "got", "noise", "offset")}
            message += (
                f": loss {outcome.got:.4g} against {outcome.expected:.4g} that its curve before step "
                f"{self.incidents.onset} leads to, noise {outcome.noise:.2g}"
            )
        return message + (f"; {lost} steps were made again" if lost else ""), data


def _begins_in(stretches: Iterable[tuple[int, int]], obs: Observation) -> bool:
    return any(first <= obs.first < last for first, last in stretches)


def _pardonable(findings: Iterable[Finding]) -> bool:
    return not any(f.kind in UNPARDONABLE and f.severity is not Severity.NOTE for f in findings)
