"""Collects the events of a journal into incidents: evidence, actions, skipped data. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from guardrail.core.events.decisions import (
    ENDS,
    Diagnosed,
    IncidentChanged,
    RemedyUsed,
    RolledBack,
    SamplesTaken,
    StepJudged,
    Undone,
)
from guardrail.core.events.event import Event
from guardrail.core.files import as_float
from guardrail.core.records.findings import Finding
from guardrail.core.records.spans import Span
from guardrail.core.text import clean_text
from guardrail.decide.undo import merge_ranges, split_span
from guardrail.report.cause_evidence import find_evidence
from guardrail.report.incident import Incident, IncidentAction, Token
from guardrail.report.journal_entries import (
    count_positions,
    read_action,
    read_documents,
    read_samples,
    read_tokens,
    read_trend,
)

# Lines that belong to an incident.
IncidentLine = StepJudged | SamplesTaken | IncidentChanged | Diagnosed | RemedyUsed
# Numbers of a line that ends an incident that were not measured.
_NOT_MEASURED = ("number", "onset", "at_step")
_NEAR = 20  # steps; verdicts without an incident's number belong together up to this distance
_TOKENS = 8  # most tokens that are kept per incident


class IncidentBuilder:
    """Collects events into incidents: by number, otherwise by their distance in steps.

    Args:
        keep: newest incidents that are remembered; None: all.
    """

    def __init__(self, *, keep: int | None = None) -> None:
        self._keep = keep
        self._found: dict[int, Incident] = {}
        self._unnumbered = 0
        self._decided: dict[int, IncidentAction] = {}  # rollbacks whose line comes later

    def add_events(self, events: Iterable[Event]) -> list[Incident]:
        """Add events, and return all incidents so far, oldest first."""
        for event in events:
            match event:
                case StepJudged():
                    self._add_verdict(event)
                case SamplesTaken():
                    self._add_remedy(event)
                case IncidentChanged():
                    self._add_state(event)
                case Diagnosed():
                    self._add_cause(event)
                case RemedyUsed():
                    incident = self._incident_of(event)
                    self._store(
                        incident, {"actions": (*incident.actions, read_action(event, "remedy"))}
                    )
                case Undone():
                    self._add_undo(event)
        while self._keep is not None and len(self._found) > self._keep:
            del self._found[next(iter(self._found))]
        # Incidents to which the journal gave no number have a negative one here.
        incidents = []
        for number, incident in self._found.items():
            if number < 0:
                incident = msgspec.structs.replace(incident, number=0)
            incidents.append(incident)
        return incidents

    def _add_verdict(self, event: StepJudged) -> None:
        action, would, findings = event.action, event.would, event.findings
        noted = action in ("", "apply") and not would and not event.incident
        if noted and (not findings or self._find_near(event) is None):
            return  # a note alone is no incident; near an open one it is evidence
        incident = self._incident_of(event, findings)
        changes: dict[str, Any] = {"findings": _join_findings(incident.findings, findings)}
        if event.parameters:
            changes["parameters"] = incident.parameters | _clean_parameters(event.parameters)
        if event.modules:
            changes["modules"] = incident.modules | {
                clean_text(str(rank), 20): clean_text(str(name), 200)
                for rank, name in event.modules.items()
            }
        if tokens := read_tokens(event.tokens):
            changes["tokens"] = _keep_longest((*incident.tokens, *tokens))
        # A rollback has its own line, with the snapshot that was used.
        if action == "apply" and would and would != "apply":
            action = f"would {would}"
        if action == "rollback":
            self._decided[incident.number] = read_action(event, "rollback")
        if action not in ("", "apply", "rollback"):
            changes["actions"] = (
                *incident.actions,
                read_action(event, clean_text(str(action), 40)),
            )
        self._store(incident, changes)

    def _add_remedy(self, event: SamplesTaken) -> None:
        span = event.span
        if event.is_by_user:
            return
        incident = self._incident_of(event)
        changes: dict[str, Any] = {}
        if span is not None and span not in incident.spans:
            changes = _add_span(incident, span, event)
            changes["actions"] = _add_sample_count(incident.actions, span)
        if isinstance(event, RolledBack):
            changes["actions"] = (
                *changes.get("actions", incident.actions),
                self._rollback(event, incident.number),
            )
        self._store(incident, changes)

    def _rollback(self, event: RolledBack, number: int) -> IncidentAction:
        """Return the rollback of this line, with the batch and the finding that led to it."""
        done, decided = read_action(event, "rollback"), self._decided.pop(number, None)
        if decided is None:
            return done
        return msgspec.structs.replace(
            done,
            batch=decided.batch,
            signal=decided.signal,
            value=decided.value,
            baseline=decided.baseline,
        )

    def _add_state(self, event: IncidentChanged) -> None:
        state = clean_text(event.state, 40)
        incident = self._incident_of(event)
        curve = read_trend(event.curve)
        trend: dict[str, Any] = {}
        if curve is not None:
            trend["curve"] = curve
        if state not in ENDS:
            self._store(incident, trend)
            return
        numbers = {
            clean_text(name, 40): as_float(value)
            for name, value in event.data.items()
            if name not in _NOT_MEASURED
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        }
        closed = None
        if state != "repeated":
            closed = event.time
        closed_step = 0
        if closed is not None:
            closed_step = event.step
        outcome = clean_text(event.message, 400)
        if outcome == f"incident {incident.number}: {state}":
            outcome = ""  # it says no more than the state
        ended = {"closed": closed, "closed_step": closed_step}
        self._store(
            incident, {**trend, **ended, "state": state, "outcome": outcome, "measured": numbers}
        )

    def _add_cause(self, event: Diagnosed) -> None:
        cause = clean_text(event.cause, 60)
        reason = clean_text(event.reason or event.message, 600)
        rank, host = event.rank, clean_text(event.host, 80)
        if rank >= 0 and cause.startswith("not reproducible"):
            reason += f"; rank {rank}"
            if host:
                reason += f" on {host}"
        changes: dict[str, Any] = {
            "cause": cause,
            "cause_reason": reason,
            "cause_rank": rank,
            "cause_host": host,
            "evidence": find_evidence(event),
            "is_new_data": event.shift,
            "is_raised_only": event.borne,
        }
        incident = self._incident_of(event)
        if event.applied:
            changes["has_bad_updates"] = True
        self._store(incident, changes)

    def _add_undo(self, event: Undone) -> None:
        """Remove the spans that a user has undone: they are no longer skipped."""
        back = event.spans
        for incident in list(self._found.values()):
            spans = tuple(span for span in incident.spans if span not in back)
            if spans == incident.spans:
                continue
            actions = (*incident.actions, read_action(event, "undo"))
            self._store(
                incident, {"spans": spans, "samples": _count_samples(spans), "actions": actions}
            )

    def _incident_of(self, event: IncidentLine, findings: Iterable[Finding] = ()) -> Incident:
        """Return the incident of an event. Its onset is the earliest that any of its events names."""
        number = _find_number(event)
        if number <= 0:
            number = self._number_near(event)
        named = [_find_onset(event), *(finding.onset for finding in findings)]
        onsets = [onset for onset in named if onset > 0]
        incident = self._found.get(number) or self._adopt_unnumbered(number, event)
        if incident is None:
            # The line with the diagnosis may come before the verdict.
            onset = min(onsets, default=_find_tried_step(event))
            return Incident(number=number, state="open", onset=onset, opened=event.time)
        return msgspec.structs.replace(incident, onset=min([incident.onset, *onsets]))

    def _adopt_unnumbered(self, number: int, event: Event) -> Incident | None:
        """Return an incident whose verdict came before the line that gives it a number."""
        before = self._find_near(event)
        if number < 0 or before is None or before.number > 0:
            return None
        del self._found[before.number]
        return msgspec.structs.replace(before, number=number)

    def _number_near(self, event: Event) -> int:
        before = self._find_near(event)
        if before is not None:
            return before.number
        self._unnumbered -= 1
        return self._unnumbered

    def _find_near(self, event: Event) -> Incident | None:
        """Return the newest incident, if it is open and at most `_NEAR` steps away."""
        last = next(reversed(self._found.values()), None)
        if last is None or last.state != "open":
            return None
        steps = (
            [action.step for action in last.actions]
            + [finding.step for finding in last.findings]
            + [last.onset]
        )
        if min(abs(event.step - step) for step in steps) <= _NEAR:
            return last
        return None

    def _store(self, incident: Incident, changes: dict[str, Any]) -> None:
        self._found[incident.number] = msgspec.structs.replace(incident, **changes)


def list_user_actions(events: Iterable[Event]) -> Iterator[IncidentAction]:
    """Give the skips and rollbacks that a user asked for. They are no incidents."""
    for event in events:
        if isinstance(event, SamplesTaken) and event.is_by_user:
            action = "skip"
            if isinstance(event, RolledBack):
                action = "rollback"
            yield read_action(event, action)


def _find_number(event: IncidentLine) -> int:
    """Return the number of the incident of a line; 0: it names none."""
    if isinstance(event, IncidentChanged):
        return event.number
    return event.incident or 0


def _find_onset(event: IncidentLine) -> int:
    """Return the first step of the anomaly; 0: the line does not name it."""
    match event:
        case StepJudged() | RolledBack() | IncidentChanged() | Diagnosed():
            return event.onset or 0
    return 0


def _find_tried_step(event: IncidentLine) -> int:
    """Return the number of the update that was tried, or the step of the line."""
    match event:
        case StepJudged() | IncidentChanged() | Diagnosed():
            return event.at_step or event.step
    return event.step


def _clean_parameters(parameters: dict[Any, Any]) -> dict[str, list[str]]:
    """Return rank -> names of its parameters with non-finite gradients, as a journal line has it."""
    found = {}
    for rank, names in parameters.items():
        if isinstance(names, list):
            cleaned = [clean_text(str(name), 200) for name in names]
            found[clean_text(str(rank), 20)] = cleaned
    return found


def _join_findings(known: tuple[Finding, ...], new: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the most severe finding per signal and kind, in the order of their first appearance."""
    worst = {(f.signal, f.kind): f for f in known}
    for finding in new:
        key = (finding.signal, finding.kind)
        before = worst.get(key)
        if before is None or (before.score == before.score and not finding.score <= before.score):
            worst[key] = finding
    return tuple(
        msgspec.structs.replace(f, signal=clean_text(f.signal, 60)) for f in worst.values()
    )


def _add_span(incident: Incident, span: Span, event: SamplesTaken) -> dict[str, Any]:
    """Return the changes that a span brings.

    The window of a rollback usually covers the batches that were rejected before it. They are not
    counted twice.
    """
    documents = read_documents(event.documents)
    total = max(event.documents_total, len(documents))
    spans = (*incident.spans, span)
    if not all(span.first <= known.first and known.last <= span.last for known in incident.spans):
        documents = tuple(dict.fromkeys((*incident.documents, *documents)))
        total += incident.documents_total
    found = {
        "spans": spans,
        "samples": _count_samples(spans),
        "documents": documents,
        "documents_total": total,
    }
    return found | {"named": (*incident.named, *read_samples(event.samples))}


def _add_sample_count(
    actions: tuple[IncidentAction, ...], span: Span
) -> tuple[IncidentAction, ...]:
    """Return the actions, with the number of skipped samples in the try of that batch."""
    for at in range(len(actions) - 1, -1, -1):
        batch = actions[at].batch
        if batch is not None and batch[0] == span.first and actions[at].samples_skipped < 0:
            known = msgspec.structs.replace(actions[at], samples_skipped=count_positions(span))
            return (*actions[:at], known, *actions[at + 1 :])
    return actions


def _count_samples(spans: Iterable[Span]) -> int:
    """Return how many positions are skipped. A span that names some of its positions skips only
    these.
    """
    pieces = merge_ranges(piece for span in spans for piece in split_span(span))
    return sum(last - first for first, last in pieces)


def _keep_longest(tokens: Iterable[Token]) -> tuple[Token, ...]:
    """Return each token once, with the longest gradient row that it had, longest first."""
    found: dict[int, Token] = {}
    for token in tokens:
        known = found.get(token.id)
        if known is None or not token.norm <= known.norm:
            found[token.id] = token
    return tuple(sorted(found.values(), key=lambda token: -_sort_key(token.norm))[:_TOKENS])


def _sort_key(norm: float) -> float:
    if norm == norm:
        return norm
    return math.inf
